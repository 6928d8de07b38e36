#include "runtime.h"

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace bdk::cuda {

namespace {

std::string version(int number) {  // 12040 is 12.4
    return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

[[noreturn]] void refuse_driver() {
    int driver = 0;
    (void)cudaDriverGetVersion(
        &driver);  // 0 where there is none, of which the runtime says that it is too old
    if (driver == 0) throw std::runtime_error("no CUDA device is present: there is no NVIDIA driver");
    throw std::runtime_error(
        "the NVIDIA driver is for CUDA " + version(driver) + " and bdkernels._cuda was built with CUDA " +
        version(CUDART_VERSION) +
        ": update the driver, or build again with a CUDA toolkit of the driver's version");
}

}  // namespace

void check(int error) {
    const auto code = static_cast<cudaError_t>(error);
    switch (code) {
        case cudaSuccess:
            return;
        case cudaErrorInsufficientDriver:
        case cudaErrorUnsupportedPtxVersion:  // of the newest PTX, which the driver compiles for newer
                                              // devices
            refuse_driver();
        case cudaErrorNoDevice:
        case cudaErrorStubLibrary:
        case cudaErrorSystemNotReady:
        case cudaErrorSystemDriverMismatch:
            throw std::runtime_error(std::string("no CUDA device is present: ") + cudaGetErrorString(code));
        case cudaErrorNoKernelImageForDevice:
            throw std::runtime_error(std::string("bdkernels._cuda was not built for this device: ") +
                                     cudaGetErrorString(code) + "; build again with BDK_CUDA_ARCHS unset");
        default:
            throw std::runtime_error(std::string("CUDA refused: ") + cudaGetErrorString(code));
    }
}

void require_device() {
    int count;
    check(cudaGetDeviceCount(&count));
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
