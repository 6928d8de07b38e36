// Group normalisation of channels-last images, with what stands around it in a residual block, in one pass
// from memory:
//
//   v = x + shift      n = (v - mean) inverse      u = n weight + bias      y = silu(u)
//
// mean and inverse = 1 / sqrt(variance + eps) are those of a sample's group of channels. Backward, with d =
// dy silu'(u):
//
//   dx = inverse ( d weight - mean_g(d weight) - n mean_g(d weight n) ) + rest
//   dweight = sum d n      dbias = sum d
//
// A sample stays in the nearest cache between the passes over it, so memory is read once and written once.
#pragma once

#include "bdk/silu.h"
#include "rows.h"

namespace bdk {

// Without silu u is y. Of the backward, dy is null in a forward call.
struct NormCall {
    const float* x;        // [samples, pixels, channels]
    float* out;            // as x
    const float* shift;    // [samples, channels] or null
    int64_t shift_stride;  // 0 where one row serves all samples
    const float *weight, *bias;
    float* statistics;  // [samples, groups, 2]: mean and 1 / sqrt(variance + eps)
    int64_t pixels, channels, groups;
    float eps;
    bool silu;
    const float* dy = nullptr;                                  // as x
    const float* rest = nullptr;                                // as x or null: what x did elsewhere
    float *dx = nullptr, *dweight = nullptr, *dbias = nullptr;  // as x; [samples, channels] each
};

constexpr int64_t kMostChannels = 2048;  // a few numbers each are kept on the stack

template <class L>
BDK_HD typename L::F channel(const float* values, int64_t c, L) {
    typename L::F v;
    memcpy(&v, values + c, sizeof v);
    return v;
}

// Sums over the pixels of one sample, a sum a channel, of value(offset of the element, channel): in float32
// over a few pixels, four sums side by side so that no addition waits for the last, and in float64 over
// those.
template <class L, class F>
BDK_HD void sum_pixels(const NormCall& call, double* sums, F value) {
    constexpr int64_t kPixels = 64;
    const int64_t C = call.channels;
    auto add = [&](int64_t c, int64_t first, int64_t last, auto lanes) {
        using Lane = decltype(lanes);
        typename Lane::F part[4]{};
        int64_t p = first;
        for (; p + 4 <= last; p += 4)
            for (int i = 0; i < 4; ++i) part[i] += value((p + i) * C + c, c, lanes);
        for (; p < last; ++p) part[0] += value(p * C + c, c, lanes);
        const typename Lane::F total = (part[0] + part[1]) + (part[2] + part[3]);
        float each[Lane::kLanes];
        memcpy(each, &total, sizeof each);
        for (int i = 0; i < Lane::kLanes; ++i) sums[c + i] += each[i];
    };
    for (int64_t c = 0; c < C; ++c) sums[c] = 0;
    for (int64_t first = 0; first < call.pixels; first += kPixels) {
        const int64_t last = first + kPixels < call.pixels ? first + kPixels : call.pixels;
        int64_t c = 0;
        for (; c + L::kLanes <= C; c += L::kLanes) add(c, first, last, L{});
        for (; c < C; ++c) add(c, first, last, Scalar{});
    }
}

// Calls body(offset of the element, channel, lanes) for every element of a sample. Channels are the outer
// loop, so that what is a channel's stays in registers.
template <class L, class F>
BDK_HD void each_element(const NormCall& call, F body) {
    int64_t c = 0;
    for (; c + L::kLanes <= call.channels; c += L::kLanes)
        for (int64_t p = 0; p < call.pixels; ++p) body(p * call.channels + c, c, L{});
    for (; c < call.channels; ++c)
        for (int64_t p = 0; p < call.pixels; ++p) body(p * call.channels + c, c, Scalar{});
}

template <class L>
void norm_sample(const NormCall& call, int64_t sample) {
    const int64_t C = call.channels, each = C / call.groups;
    const float* x = call.x + sample * call.pixels * C;
    float* out = call.out + sample * call.pixels * C;
    alignas(64) float shift[kMostChannels], scale[kMostChannels], offset[kMostChannels];
    alignas(64) double sums[kMostChannels];
    for (int64_t c = 0; c < C; ++c)
        shift[c] = call.shift == nullptr ? 0 : call.shift[sample * call.shift_stride + c];

    sum_pixels<L>(call, sums, [&](int64_t at, int64_t, auto lanes) { return channel(x, at, lanes); });
    const double count = double(call.pixels * each);
    for (int64_t g = 0; g < call.groups; ++g) {
        double mean = 0;
        for (int64_t c = g * each; c < (g + 1) * each; ++c) mean += sums[c] + double(shift[c]) * call.pixels;
        mean /= count;
        for (int64_t c = g * each; c < (g + 1) * each; ++c) offset[c] = float(mean - shift[c]);
        call.statistics[2 * (sample * call.groups + g)] = float(mean);
    }
    sum_pixels<L>(call, sums, [&](int64_t at, int64_t c, auto lanes) {
        const auto d = channel(x, at, lanes) - channel(offset, c, lanes);
        return d * d;
    });
    for (int64_t g = 0; g < call.groups; ++g) {
        double variance = 0;
        for (int64_t c = g * each; c < (g + 1) * each; ++c) variance += sums[c];
        const float inverse = float(1 / std::sqrt(variance / count + call.eps));
        call.statistics[2 * (sample * call.groups + g) + 1] = inverse;
        for (int64_t c = g * each; c < (g + 1) * each; ++c) {
            scale[c] = inverse * call.weight[c];
            offset[c] = call.bias[c] - offset[c] * scale[c];
        }
    }
    each_element<L>(call, [&](int64_t at, int64_t c, auto lanes) {
        using Lane = decltype(lanes);
        auto v =
            Lane::multiply_add(channel(x, at, lanes), channel(scale, c, lanes), channel(offset, c, lanes));
        if (call.silu) v = silu<Lane>(v);
        memcpy(out + at, &v, sizeof v);
    });
}

template <class L>
void norm_backward_sample(const NormCall& call, int64_t sample) {
    const int64_t C = call.channels, each = C / call.groups, first = sample * call.pixels * C;
    const float *x = call.x + first, *dy = call.dy + first;
    float *dx = call.dx + first, *dweight = call.dweight + sample * C, *dbias = call.dbias + sample * C;
    // n = x inverse + offset; of dx, d comes with weight inverse, and the group's means with n and without
    // it.
    alignas(64) float inverse[kMostChannels], offset[kMostChannels], mean_n[kMostChannels],
        mean_1[kMostChannels];
    alignas(64) float weight[kMostChannels];
    alignas(64) double sums[kMostChannels];
    for (int64_t c = 0; c < C; ++c) {
        const float* statistics = call.statistics + 2 * (sample * call.groups + c / each);
        const float shift = call.shift == nullptr ? 0 : call.shift[sample * call.shift_stride + c];
        inverse[c] = statistics[1];
        offset[c] = (shift - statistics[0]) * statistics[1];
    }
    auto normalised = [&](int64_t at, int64_t c, auto lanes) {
        return decltype(lanes)::multiply_add(channel(x, at, lanes), channel(inverse, c, lanes),
                                             channel(offset, c, lanes));
    };
    auto slope = [&](int64_t at, int64_t c, auto n, auto lanes) {
        using Lane = decltype(lanes);
        const auto d = channel(dy, at, lanes);
        if (!call.silu) return typename Lane::F(d);
        const auto u = Lane::multiply_add(n, channel(call.weight, c, lanes), channel(call.bias, c, lanes));
        return typename Lane::F(d * silu_slope<Lane>(u));
    };
    // d is kept in dx between the passes: the exponential is the dearest part.
    sum_pixels<L>(call, sums, [&](int64_t at, int64_t c, auto lanes) {
        const auto d = slope(at, c, normalised(at, c, lanes), lanes);
        memcpy(dx + at, &d, sizeof d);
        return d;
    });
    for (int64_t c = 0; c < C; ++c) dbias[c] = float(sums[c]);
    sum_pixels<L>(call, sums, [&](int64_t at, int64_t c, auto lanes) {
        return channel(dx, at, lanes) * normalised(at, c, lanes);
    });
    for (int64_t c = 0; c < C; ++c) dweight[c] = float(sums[c]);
    const double count = double(call.pixels * each);
    for (int64_t g = 0; g < call.groups; ++g) {
        double one = 0, with_n = 0;
        for (int64_t c = g * each; c < (g + 1) * each; ++c) {
            one += double(call.weight[c]) * dbias[c];
            with_n += double(call.weight[c]) * dweight[c];
        }
        for (int64_t c = g * each; c < (g + 1) * each; ++c) {
            weight[c] = call.weight[c] * inverse[c];
            mean_1[c] = float(-one / count) * inverse[c];
            mean_n[c] = float(-with_n / count) * inverse[c];
        }
    }
    const float* rest = call.rest == nullptr ? nullptr : call.rest + first;
    each_element<L>(call, [&](int64_t at, int64_t c, auto lanes) {
        using Lane = decltype(lanes);
        const auto means = Lane::multiply_add(normalised(at, c, lanes), channel(mean_n, c, lanes),
                                              channel(mean_1, c, lanes));
        typename Lane::F v = Lane::multiply_add(channel(dx, at, lanes), channel(weight, c, lanes), means);
        if (rest != nullptr) v += channel(rest, at, lanes);
        memcpy(dx + at, &v, sizeof v);
    });
}

template <class L>
void any_norm(const NormCall& call, int64_t sample) {
    call.dy == nullptr ? norm_sample<L>(call, sample) : norm_backward_sample<L>(call, sample);
}

}  // namespace bdk
