"""The possible contents of a cell: words that are a single token of SmolLM2, digits, punctuation, decoration."""

from __future__ import annotations

LABELS = """Name City Date Code Phone Total Tax Order Price Size Color Type Room Floor Team Grade Score Level Title Job Age Group
Store State Street House Client Agent Gate Train Class Model Brand Year Month Day Time Rate Zone Unit Stock Weight Height Author
Doctor Nurse Ward Bill Count Branch Region Bank Fund Loan Term Plan Status Load Speed Range Depth Length Power""".split()
NAMES = """Anna Mary John Peter Paul Laura Emma David Sarah James Robert Linda Susan Karen Lisa Nancy Betty Helen Sandra Mark
George Kevin Brian Edward Ronald Tim Jason Jeff Ryan Jacob Gary Eric Larry Scott Frank Adam Henry Alice Julia Grace Diana Nina
Rosa Clara Simon Oscar Victor Martin Felix Hugo Leo Max Ivan Omar Luis Carlos Maria Jane Kate Rachel""".split()
CITIES = """Paris London Rome Berlin Madrid Vienna Dublin Oslo Cairo Lima Delhi Tokyo Boston Dallas Miami Denver Austin Milan
Venice Athens Geneva Prague Warsaw Moscow Seoul Sydney Perth Quebec Havana Kenya Ghana Peru Chile Brazil Mexico Canada Spain
Italy France Japan China India Nepal Egypt""".split()
ITEMS = """bread milk rice salt sugar flour butter cheese eggs apple banana orange lemon grape peach cherry berry tomato potato
onion garlic carrot pepper corn beans soup pasta meat beef pork fish tuna honey juice water coffee tea wine beer cream cake candy
cookie soap brush towel paper pen pencil book""".split()
CONTROLS = """Save Open Close Print Copy Paste Help Exit Search Edit View File Home Back Next Send Delete Upload Share Login Menu
Tools Zoom Play Stop Record Start Filter Sort Select Apply Submit Insert Format Window Export Import Update Cart Pay Sign Lock
Clear Find Move Crop""".split()
COLORS = "red blue green yellow black white brown pink purple gray gold silver".split()
MONTHS = "March April May June July August".split()

WORDS = list(dict.fromkeys(LABELS + NAMES + CITIES + ITEMS + CONTROLS + COLORS + MONTHS))
DIGITS = list("0123456789")
PUNCTUATION = list(":.,/$-")

# Held out of training: every sixth word of its group.
HELD_OUT = frozenset(word for group in (NAMES, CITIES, ITEMS, CONTROLS) for word in group[5::6])

# Contents of cells without text, and the token that stands for each. The last cell of a row ends the line.
BLANK, LINE_END = "", "line end"
DECORATION = {"rule": "_", "bar": "|", "dots": "..", "hatch": "#", "logo": "*", "wave": "~", "double rule": "="}

CLASSES = [BLANK, LINE_END, *DECORATION, *PUNCTUATION, *DIGITS, *WORDS]
INDEX = {name: number for number, name in enumerate(CLASSES)}
TEXT = frozenset(PUNCTUATION + DIGITS + WORDS)


def as_token(cell: str) -> str:
    """The text of the token that a cell stands for."""
    if cell == BLANK:
        return " "
    if cell == LINE_END:
        return "\n"
    if cell in DECORATION:
        return DECORATION[cell]
    return f" {cell}" if len(cell) > 1 else cell
