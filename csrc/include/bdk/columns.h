// The columns of a sampler row and of a noising row, as numbered in bdkernels/columns.py.
#pragma once

#include "lane.h"

namespace bdk {

constexpr int HISTORY_SLOTS = 4;
constexpr int STORES = 2;

struct Step {
    enum Column { A, B, D, LOW0, HIGH0, P, Q, S, Z, R, LOW, HIGH, H, STORE = H + HISTORY_SLOTS };
};
struct Store {
    enum Column { SLOT, E, F, G, J, K = J + HISTORY_SLOTS };
};
struct Noising {
    enum Column { A, S, M, C, W };
};

constexpr int STORE_COLUMNS = Store::K + 1;
constexpr int STEP_COLUMNS =
    Step::STORE + STORES * STORE_COLUMNS + 2;  // and two for the network: input scale, time
constexpr int NOISING_COLUMNS = Noising::W + 1;
static_assert(STEP_COLUMNS == 36 && STORE_COLUMNS == 9 && NOISING_COLUMNS == 5, "columns.py says otherwise");

// One row for every element: row[column] is the same in all lanes.
template <class L, int kColumns>
struct Row {
    typename L::F value[kColumns];

    BDK_HD explicit Row(const float* row) {
        for (int c = 0; c < kColumns; ++c) value[c] = L::broadcast(row[c]);
    }
    BDK_HD typename L::F operator[](int c) const { return value[c]; }
};

// Whether any term of a sampler row has the history slot.
BDK_HD bool reads_slot(const float* row, int slot) {
    bool reads = row[Step::H + slot] != 0;
    for (int k = 0; k < STORES; ++k)
        reads = reads || row[Step::STORE + k * STORE_COLUMNS + Store::J + slot] != 0;
    return reads;
}

// Two rows mixed: `inside` where the region holds.
template <class L, int kColumns, class Mask>
struct MixedRow {
    const Row<L, kColumns>&outside, &inside;
    Mask region;

    BDK_HD typename L::F operator[](int c) const { return region ? inside[c] : outside[c]; }
};

}  // namespace bdk
