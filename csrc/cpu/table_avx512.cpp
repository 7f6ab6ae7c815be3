#define MIXKV_TABLE table_avx512
#define MIXKV_NAME "avx512"
#include "table.h"
