"""Pages of the site that lie outside docs/: the research notes, and files of the project itself.

Links between them and docs/ are written as they work in the repository; here they are rewritten for the site. A link to a file that is
no page of the site, such as a module, becomes its text.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)#\s]+)(#[\w-]+)?\)")


def outside():
    """Paths in the repository of the pages that are added."""
    found = [*sorted((ROOT / "research").glob("*.md")), ROOT / "benchmarks" / "README.md", ROOT / "examples" / "tour.ipynb"]
    found += [ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md") if (ROOT / name).is_file()]
    return [path.relative_to(ROOT).as_posix() for path in found]


# Before the plugin that renders notebooks looks for them.
@event_priority(100)
def on_files(files, config):
    for path in outside():
        files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown, page, config, files):
    here = page.file.src_uri
    here = here if here in outside() else f"docs/{here}"

    def rewritten(found):
        mark, text, target, anchor = found.groups()
        place = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
        uri = place.removeprefix("docs/")
        if files.get_file_from_path(uri) is None:
            return text
        relative = posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".")
        return f"{mark}[{text}]({relative}{anchor or ''})"

    return LINK.sub(rewritten, markdown)
