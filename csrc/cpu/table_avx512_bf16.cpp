#define MIXKV_TABLE table_avx512_bf16
#define MIXKV_NAME "avx512_bf16"
#include "table.h"
