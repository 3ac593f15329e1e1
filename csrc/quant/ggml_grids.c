// ggml's quantizers, and a way to the grids of the IQ types, which it keeps to itself. Compiled in place of ggml-quants.c.
#include "ggml-quants.c"

// The grid of a type after ggml_quantize_init. A point is a 32- or 64-bit word of int8 values 2 * code + 1.
void pgs_ggml_grid(enum ggml_type type, const void** points, int* n, const int** map, const uint16_t** neighbours) {
    if (type == GGML_TYPE_IQ3_XXS || type == GGML_TYPE_IQ3_S) {
        *n = type == GGML_TYPE_IQ3_XXS ? 256 : 512;
        const iq3_entry_t* e = &iq3_data[iq3_data_index(*n)];
        *points = e->grid, *map = e->map, *neighbours = e->neighbours;
    } else {
        *n = iq2_grid_size(type);
        const iq2_entry_t* e = &iq2_data[iq2_data_index(type)];
        *points = e->grid, *map = e->map, *neighbours = e->neighbours;
    }
}
