// A CUDA runtime without a device, for what nvcc compiles: launches go to a function of the test's.
//
// Linked in the place of libcudart_static.a. A kernel's host stub registers its name in the PTX under its own
// address, by which it is launched.
#include <cstddef>
#include <map>
#include <string>

namespace {

enum Error { kSuccess = 0, kInvalidConfiguration = 9, kInvalidDeviceFunction = 98, kNoDevice = 100 };

struct dim3 {
    unsigned x, y, z;
};

using Launcher = int (*)(const char* kernel, const unsigned* grid, const unsigned* block, void** arguments,
                         size_t shared);

Launcher launcher;

std::map<const void*, std::string>& kernels() {
    static std::map<const void*, std::string> names;  // filled before main, in any order of files
    return names;
}

// The limits of every device since compute capability 3.0.
bool possible(dim3 grid, dim3 block) {
    return grid.x && grid.y && grid.z && grid.x <= 0x7fffffff && grid.y <= 65535 && grid.z <= 65535 &&
           block.x && block.y && block.z && size_t(block.x) * block.y * block.z <= 1024;
}

}  // namespace

extern "C" {

void simulated_launches_go_to(Launcher to) { launcher = to; }

void** __cudaRegisterFatBinary(void*) {
    static void* handle;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, void*, void*, void*,
                            void*, int*) {
    kernels()[stub] = name;
}
int __cudaGetKernel(const void** kernel, const void* stub) {
    *kernel = stub;
    return kernels().count(stub) ? kSuccess : kInvalidDeviceFunction;
}
// Kernels are launched by cudaLaunchKernel: what `<<< >>>` would push is never there.
unsigned __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return kInvalidConfiguration; }

int cudaLaunchKernel(const void* stub, dim3 grid, dim3 block, void** arguments, size_t shared, void*) {
    if (launcher == nullptr) return kNoDevice;
    if (!possible(grid, block)) return kInvalidConfiguration;
    const auto found = kernels().find(stub);
    if (found == kernels().end()) return kInvalidDeviceFunction;
    const unsigned blocks[] = {grid.x, grid.y, grid.z}, threads[] = {block.x, block.y, block.z};
    return launcher(found->second.c_str(), blocks, threads, arguments, shared);
}
int __cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared, void* s) {
    return cudaLaunchKernel(kernel, grid, block, arguments, shared, s);
}

int cudaDriverGetVersion(int* version) {
    *version = 0;
    return kSuccess;
}
int cudaGetDeviceCount(int* count) {
    *count = 1;
    return kSuccess;
}
int cudaGetDevice(int* device) {
    *device = 0;
    return kSuccess;
}
int cudaSetDevice(int device) { return device == 0 ? kSuccess : 101; }
const char* cudaGetErrorString(int error) {
    return error == kInvalidConfiguration    ? "invalid configuration argument"
           : error == kInvalidDeviceFunction ? "invalid device function"
           : error == kNoDevice              ? "no CUDA-capable device is detected"
                                             : "unspecified launch failure";
}
}
