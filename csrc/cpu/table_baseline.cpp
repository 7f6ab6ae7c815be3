#define MIXKV_TABLE table_baseline
#define MIXKV_NAME "baseline"
#include "table.h"
