#include "runtime.h"

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace bdk::cuda {

void check(int error) {
    const auto code = static_cast<cudaError_t>(error);
    switch (code) {
        case cudaSuccess:
            return;
        case cudaErrorNoDevice:
        case cudaErrorInsufficientDriver:  // also where there is no driver at all
        case cudaErrorStubLibrary:
        case cudaErrorSystemNotReady:
        case cudaErrorSystemDriverMismatch:
            throw std::runtime_error(std::string("no CUDA device is present: ") + cudaGetErrorString(code));
        case cudaErrorNoKernelImageForDevice:
        case cudaErrorUnsupportedPtxVersion:
            throw std::runtime_error(std::string("bdkernels._cuda was not built for this device: ") +
                                     cudaGetErrorString(code) + "; build again with BDK_CUDA_ARCHS unset");
        default:
            throw std::runtime_error(std::string("CUDA refused: ") + cudaGetErrorString(code));
    }
}

OnDevice::OnDevice(int device) : device_(device) {
    check(cudaGetDevice(&before_));
    if (before_ != device_) check(cudaSetDevice(device_));
}

OnDevice::~OnDevice() {
    if (before_ != device_) (void)cudaSetDevice(before_);  // it was current a moment ago
}

void refuse(const char* what, long long value, long long limit) {
    throw std::invalid_argument(std::string(what) + " is " + std::to_string(value) + ": expected at most " +
                                std::to_string(limit));
}

}  // namespace bdk::cuda
