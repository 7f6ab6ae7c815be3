#define MIXKV_TABLE table_avx2
#define MIXKV_NAME "avx2"
#include "table.h"
