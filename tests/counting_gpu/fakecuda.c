// The CUDA driver as far as Triton asks for it, without a GPU.
#include <cuda.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <dlfcn.h>
#undef cuDevicePrimaryCtxRetain
#define E __attribute__((visibility("default")))
static int (*attr)(int); static void (*cnt)(const char *, CUstream);
static int (*capture)(CUstream, CUstreamCaptureStatus *);
static void init(void) {
  if (attr) return;
  attr = dlsym(RTLD_DEFAULT, "fc_attribute");
  cnt = dlsym(RTLD_DEFAULT, "fc_launched");
  capture = dlsym(RTLD_DEFAULT, "cudaStreamIsCapturing");
}
typedef struct { char name[256]; } Fn;
E CUresult cuInit(unsigned f) { return 0; }
E CUresult cuDriverGetVersion(int *v) { *v = 13000; return 0; }
E CUresult cuDeviceGet(CUdevice *d, int i) { *d = 0; return 0; }
E CUresult cuDeviceGetCount(int *n) { *n = 1; return 0; }
E CUresult cuDeviceGetName(char *s, int n, CUdevice d) { snprintf(s, n, "Fake H100"); return 0; }
E CUresult cuDeviceGetAttribute(int *v, CUdevice_attribute a, CUdevice d) { init(); *v = attr ? attr(a) : 0; return 0; }
E CUresult cuCtxGetCurrent(CUcontext *c) { *c = (CUcontext)0x1; return 0; }
E CUresult cuCtxGetDevice(CUdevice *d) { *d = 0; return 0; }
E CUresult cuCtxSetCurrent(CUcontext c) { return 0; }
E CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { *c = (CUcontext)0x1; return 0; }
E CUresult cuDevicePrimaryCtxGetState(CUdevice d, unsigned *f, int *a) { *f = 0; *a = 1; return 0; }
E CUresult cuCtxGetLimit(size_t *v, CUlimit l) { *v = 1 << 20; return 0; }
E CUresult cuCtxSetLimit(CUlimit l, size_t v) { return 0; }
E CUresult cuModuleLoadData(CUmodule *m, const void *d) { *m = (CUmodule)0x2; return 0; }
E CUresult cuModuleLoad(CUmodule *m, const char *d) { *m = (CUmodule)0x2; return 0; }
E CUresult cuModuleUnload(CUmodule m) { return 0; }
E CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *n) { Fn *x = calloc(1, sizeof(Fn)); snprintf(x->name, 256, "kernel triton %s", n); *f = (CUfunction)x; return 0; }
E CUresult cuFuncGetAttribute(int *v, CUfunction_attribute a, CUfunction f) { *v = a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : a == CU_FUNC_ATTRIBUTE_NUM_REGS ? 40 : 0; return 0; }
E CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) { return 0; }
E CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache c) { return 0; }
E CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **p, void **e) { init(); if (cnt) cnt(((Fn *)f)->name, c->hStream); return 0; }
E CUresult cuLaunchKernel(CUfunction f, unsigned a, unsigned b, unsigned c, unsigned d, unsigned e, unsigned g, unsigned s, CUstream st, void **p, void **x) { init(); if (cnt) cnt(((Fn *)f)->name, st); return 0; }
// Triton 3.9 asks before a launch; the runtime knows, and its states have the driver's numbers
E CUresult cuStreamIsCapturing(CUstream s, CUstreamCaptureStatus *status) { init(); *status = CU_STREAM_CAPTURE_STATUS_NONE; return capture ? capture(s, status) : 0; }
E CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *c) { *n = 132; return 0; }

E CUresult cuGetErrorString(CUresult e, const char **s) { *s = "fake"; return 0; }
E CUresult cuGetErrorName(CUresult e, const char **s) { *s = "fake"; return 0; }
E CUresult cuPointerGetAttribute(void *d, CUpointer_attribute a, CUdeviceptr p) { *(CUdeviceptr *)d = p; return 0; }
E CUresult cuGetExportTable(const void **t, const CUuuid *u) { return 999; }
E CUresult cuGetProcAddress_v2(const char *s, void **p, int v, cuuint64_t f, CUdriverProcAddressQueryResult *st) { return 999; }
E CUresult cuTensorMapEncodeTiled(CUtensorMap *m, CUtensorMapDataType t, cuuint32_t r, void *g, const cuuint64_t *d, const cuuint64_t *s, const cuuint32_t *b, const cuuint32_t *e, CUtensorMapInterleave i, CUtensorMapSwizzle w, CUtensorMapL2promotion l, CUtensorMapFloatOOBfill o) { return 0; }
