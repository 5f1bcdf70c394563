// A CUDA runtime and cuBLAS without a GPU: memory is reserved host memory, kernels are counted and not run.
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <cublas_v2.h>
#include <cublasLt.h>
#include <dlfcn.h>
#include <execinfo.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#undef cudaGetDeviceProperties
#define EXPORT __attribute__((visibility("default")))

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t total_mem(void) { const char *e = getenv("FAKE_GIB"); return (uint64_t)((e ? atof(e) : 79.0) * (1ull << 30)); }
static uint64_t used = 0, peak = 0;
static __thread cudaError_t last = cudaSuccess;
static cudaError_t err(cudaError_t e) { if (e) last = e; return e; }

// ---- counters: name -> count
typedef struct { char name[400]; uint64_t count; uint64_t bytes; } Counter;
#define MAXC 20000
static Counter counters[MAXC]; static int num_counters = 0;
static int tracing = 0;
EXPORT void fc_trace(int on) { tracing = on; }
static void count(const char *name, uint64_t bytes) {
  pthread_mutex_lock(&lock);
  uint64_t h = 1469598103934665603ull; for (const char *p = name; *p; p++) h = (h ^ (unsigned char)*p) * 1099511628211ull;
  int i = h % MAXC;
  while (counters[i].count && strncmp(counters[i].name, name, 399)) i = (i + 1) % MAXC;
  if (!counters[i].count) { strncpy(counters[i].name, name, 399); num_counters++; }
  counters[i].count++; counters[i].bytes += bytes;
  if (tracing) fprintf(stderr, "[fake] %s %llu\n", name, (unsigned long long)bytes);
  pthread_mutex_unlock(&lock);
}
EXPORT void fc_reset(void) { pthread_mutex_lock(&lock); memset(counters, 0, sizeof counters); num_counters = 0; pthread_mutex_unlock(&lock); }
EXPORT void fc_dump(const char *path) {
  pthread_mutex_lock(&lock);
  FILE *f = fopen(path, "w");
  for (int i = 0; i < MAXC; i++) if (counters[i].count) fprintf(f, "%llu\t%llu\t%s\n", (unsigned long long)counters[i].count, (unsigned long long)counters[i].bytes, counters[i].name);
  fclose(f); pthread_mutex_unlock(&lock);
}
EXPORT uint64_t fc_used(void) { return used; }
EXPORT uint64_t fc_peak(void) { return peak; }
EXPORT void fc_count(const char *name) { count(name, 0); }

// ---- device memory
typedef struct { char *p; size_t n; int kind; } Block;  // kind 2 device, 1 host
#define MAXB 200000
static Block blocks[MAXB]; static int num_blocks = 0;
static Block *find(const void *p) { for (int i = num_blocks - 1; i >= 0; i--) if (blocks[i].p && (char *)p >= blocks[i].p && (char *)p < blocks[i].p + blocks[i].n) return &blocks[i]; return NULL; }
static void add_block(void *p, size_t n, int kind) {
  int i; for (i = 0; i < num_blocks; i++) if (!blocks[i].p) break;
  if (i == num_blocks) num_blocks++;
  blocks[i] = (Block){p, n, kind};
}
static int kind_of(const void *p) { pthread_mutex_lock(&lock); Block *b = find(p); int k = b ? b->kind : 0; pthread_mutex_unlock(&lock); return k; }

// ---- capture state
static cudaStream_t capturing = NULL; static int is_capturing = 0, is_invalid = 0; static pthread_t recorder; static uint64_t capture_nodes = 0, capture_id = 0;
// as with cudaStreamCaptureModeThreadLocal: what other threads do meanwhile is theirs
static int records_here(void) { return is_capturing && pthread_equal(pthread_self(), recorder); }
static cudaError_t illegal(const char *what) {
  char b[200]; snprintf(b, 200, "ILLEGAL in capture: %s", what); count(b, 0);
  is_invalid = 1;
  fprintf(stderr, "[fake] illegal while capturing: %s\n", what);
  return err(cudaErrorStreamCaptureUnsupported);
}

EXPORT cudaError_t cudaMalloc(void **p, size_t n) {
  if (used + n > total_mem()) return err(cudaErrorMemoryAllocation);
  void *m = mmap(NULL, (n + 2097151) & ~2097151ull, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (m == MAP_FAILED) return err(cudaErrorMemoryAllocation);
  pthread_mutex_lock(&lock); used += n; if (used > peak) peak = used; add_block(m, n, 2); pthread_mutex_unlock(&lock);
  count("cudaMalloc", n);
  *p = m; return cudaSuccess;
}
EXPORT cudaError_t cudaFree(void *p) {
  if (!p) return cudaSuccess;
  pthread_mutex_lock(&lock); Block *b = find(p); size_t n = 0; if (b) { n = b->n; used -= n; b->p = NULL; } pthread_mutex_unlock(&lock);
  if (n) munmap(p, (n + 2097151) & ~2097151ull);
  count("cudaFree (waits for the device)", 0);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMallocAsync(void **p, size_t n, cudaStream_t s) { return cudaMalloc(p, n); }
EXPORT cudaError_t cudaFreeAsync(void *p, cudaStream_t s) { return cudaFree(p); }
EXPORT cudaError_t cudaHostAlloc(void **p, size_t n, unsigned f) {
  if (posix_memalign(p, 4096, n ? n : 1)) return err(cudaErrorMemoryAllocation);
  pthread_mutex_lock(&lock); add_block(*p, n, 1); pthread_mutex_unlock(&lock);
  count("cudaHostAlloc", n); return cudaSuccess;
}
EXPORT cudaError_t cudaFreeHost(void *p) { pthread_mutex_lock(&lock); Block *b = find(p); if (b) b->p = NULL; pthread_mutex_unlock(&lock); free(p); return cudaSuccess; }
EXPORT cudaError_t cudaHostRegister(void *p, size_t n, unsigned f) { pthread_mutex_lock(&lock); add_block(p, n, 1); pthread_mutex_unlock(&lock); count("cudaHostRegister", n); return cudaSuccess; }
EXPORT cudaError_t cudaHostUnregister(void *p) { pthread_mutex_lock(&lock); Block *b = find(p); if (b) b->p = NULL; pthread_mutex_unlock(&lock); return cudaSuccess; }
EXPORT cudaError_t cudaMemGetInfo(size_t *f, size_t *t) { *t = total_mem(); *f = *t - used; return cudaSuccess; }

// a launch is part of the graph by its stream, whichever thread makes it (autograd's backward has one of its own)
static void note_capture(cudaStream_t st) {
  if (!is_capturing) return;
  if (st == capturing) __sync_fetch_and_add(&capture_nodes, 1); else count("launch beside a capture", 0);
}
static cudaError_t copy(void *d, const void *s, size_t n, enum cudaMemcpyKind kind, int is_async, cudaStream_t st) {
  if (!n) return cudaSuccess;
  int kd = kind_of(d), ks = kind_of(s);
  const char *from = ks == 2 ? "device" : ks == 1 ? "pinned" : "pageable", *to = kd == 2 ? "device" : kd == 1 ? "pinned" : "pageable";
  char b[200];
  const char *size = n <= 65536 ? "" : " above 64 KB";
  snprintf(b, 200, "memcpy %s -> %s%s%s", from, to, is_async ? " async" : " sync", (ks == 0 || kd == 0) ? size : "");
  count(b, n);
  if (records_here() && !(kd == 2 && ks == 2)) fprintf(stderr, "[fake] in capture: %s of %zu bytes\n", b, n);
  note_capture(st);
  if (kd == 2 && ks == 2) { if (n <= 4096) memcpy(d, s, n); return cudaSuccess; }
  if (kd == 2) { if (n <= (1 << 16)) memcpy(d, s, n); return cudaSuccess; }
  // a few numbers that the host reads are 0, such as a token: nothing was computed, and what lies there may be no token
  if (ks == 2 && n <= 64) memset(d, 0, n); else memcpy(d, s, n);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpy(void *d, const void *s, size_t n, enum cudaMemcpyKind k) { if (records_here()) return illegal("cudaMemcpy"); return copy(d, s, n, k, 0, 0); }
EXPORT cudaError_t cudaMemcpyAsync(void *d, const void *s, size_t n, enum cudaMemcpyKind k, cudaStream_t st) { return copy(d, s, n, k, 1, st); }
EXPORT cudaError_t cudaMemcpyPeerAsync(void *d, int dd, const void *s, int sd, size_t n, cudaStream_t st) { return copy(d, s, n, 3, 1, st); }
EXPORT cudaError_t cudaMemcpy2DAsync(void *d, size_t dp, const void *s, size_t sp, size_t w, size_t h, enum cudaMemcpyKind k, cudaStream_t st) { count("cudaMemcpy2DAsync", w * h); return cudaSuccess; }
EXPORT cudaError_t cudaMemcpyToSymbol(const void *sym, const void *src, size_t n, size_t o, enum cudaMemcpyKind k) { return cudaSuccess; }
EXPORT cudaError_t cudaMemset(void *d, int v, size_t n) { if (n <= 65536) memset(d, v, n); count("cudaMemset", n); return cudaSuccess; }
EXPORT cudaError_t cudaMemsetAsync(void *d, int v, size_t n, cudaStream_t s) { note_capture(s); if (n <= 65536) memset(d, v, n); count("cudaMemsetAsync", n); return cudaSuccess; }
EXPORT cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
  memset(a, 0, sizeof *a); int k = kind_of(p);
  a->type = k == 2 ? cudaMemoryTypeDevice : k == 1 ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  a->devicePointer = k ? (void *)p : NULL; a->hostPointer = k == 1 ? (void *)p : NULL; return cudaSuccess;
}
EXPORT cudaError_t cudaGetSymbolAddress(void **p, const void *s) { static char dummy[1 << 20]; *p = dummy; return cudaSuccess; }

// ---- devices
// FAKE_GPUS: how many; their memory is one
static int num_devices(void) { const char *e = getenv("FAKE_GPUS"); return e ? atoi(e) : 1; }
static __thread int device = 0;
EXPORT cudaError_t cudaGetDeviceCount(int *n) { *n = num_devices(); return cudaSuccess; }
EXPORT cudaError_t cudaGetDevice(int *d) { *d = device; return cudaSuccess; }
EXPORT cudaError_t cudaSetDevice(int d) { if (d < 0 || d >= num_devices()) return err(cudaErrorInvalidDevice); device = d; return cudaSuccess; }
EXPORT cudaError_t cudaDeviceSynchronize(void) { if (records_here()) return illegal("cudaDeviceSynchronize"); count("SYNC cudaDeviceSynchronize", 0); return cudaSuccess; }
EXPORT cudaError_t cudaDeviceCanAccessPeer(int *c, int a, int b) { *c = 0; return cudaSuccess; }
EXPORT cudaError_t cudaDeviceEnablePeerAccess(int a, unsigned f) { return cudaSuccess; }
EXPORT cudaError_t cudaDeviceGetPCIBusId(char *s, int n, int d) { snprintf(s, n, "0000:01:00.0"); return cudaSuccess; }
EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int *l, int *g) { *l = 0; *g = -5; return cudaSuccess; }
EXPORT cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *p, int d) { *p = (cudaMemPool_t)0x77; return cudaSuccess; }
EXPORT cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t p, enum cudaMemPoolAttr a, void *v) { *(uint64_t *)v = 0; return cudaSuccess; }
EXPORT cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t p, enum cudaMemPoolAttr a, void *v) { return cudaSuccess; }
EXPORT cudaError_t cudaMemPoolSetAccess(cudaMemPool_t p, const struct cudaMemAccessDesc *d, size_t c) { return cudaSuccess; }
EXPORT cudaError_t cudaMemPoolTrimTo(cudaMemPool_t p, size_t n) { return cudaSuccess; }
EXPORT cudaError_t cudaDriverGetVersion(int *v) { *v = 13000; return cudaSuccess; }
EXPORT cudaError_t cudaRuntimeGetVersion(int *v) { *v = 13000; return cudaSuccess; }
static int attribute(int a) {
  switch (a) {
    case 1: return 1024; case 2: case 3: return 1024; case 4: return 64; case 5: return 2147483647; case 6: case 7: return 65535;
    case 8: return 49152; case 9: return 65536; case 10: return 32; case 12: return 65536; case 13: return 1980000; case 16: return 132;
    case 36: return 2619000; case 37: return 5120; case 38: return 50 * 1024 * 1024; case 39: return 2048; case 41: return 1;
    case 75: return 9; case 76: return 0; case 81: return 233472; case 82: return 65536; case 95: return 1; case 97: return 232448;
    case 106: return 32; case 111: return 1024; case 115: return 1; case 120: return 1; case 119: return 3;
    default: return 0;
  }
}
EXPORT cudaError_t cudaDeviceGetAttribute(int *v, enum cudaDeviceAttr a, int d) { *v = attribute(a); return cudaSuccess; }
EXPORT int fc_attribute(int a) { return attribute(a); }
EXPORT cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int d) {
  memset(p, 0, sizeof *p); strcpy(p->name, "Fake H100"); p->totalGlobalMem = total_mem(); p->sharedMemPerBlock = 49152; p->regsPerBlock = 65536;
  p->warpSize = 32; p->maxThreadsPerBlock = 1024; p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024; p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647; p->maxGridSize[1] = p->maxGridSize[2] = 65535; p->totalConstMem = 65536; p->major = 9; p->minor = 0;
  p->textureAlignment = 512; p->multiProcessorCount = 132; p->l2CacheSize = 50 * 1024 * 1024; p->maxThreadsPerMultiProcessor = 2048;
  p->sharedMemPerMultiprocessor = 233472; p->regsPerMultiprocessor = 65536; p->sharedMemPerBlockOptin = 232448; p->memoryBusWidth = 5120;
  p->cooperativeLaunch = 1; p->maxBlocksPerMultiProcessor = 32; p->unifiedAddressing = 1; p->asyncEngineCount = 3; p->concurrentKernels = 1;
  p->managedMemory = 1; p->canMapHostMemory = 1; p->memoryPoolsSupported = 1; p->clusterLaunch = 1; p->reservedSharedMemPerBlock = 1024;
  p->pciBusID = 1;
  return cudaSuccess;
}

// ---- streams, events
static uint64_t handles = 0x1000;
EXPORT cudaError_t cudaStreamCreate(cudaStream_t *s) { *s = (cudaStream_t)(handles += 16); return cudaSuccess; }
EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned f, int p) { return cudaStreamCreate(s); }
EXPORT cudaError_t cudaStreamDestroy(cudaStream_t s) { return cudaSuccess; }
EXPORT cudaError_t cudaStreamQuery(cudaStream_t s) { return cudaSuccess; }
EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t s, int *p) { *p = 0; return cudaSuccess; }
EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t s) {
  if (records_here()) return illegal("cudaStreamSynchronize");
  count("SYNC cudaStreamSynchronize", 0);
  if (getenv("FAKE_SYNC_TRACE")) { void *a[40]; int n = backtrace(a, 40); backtrace_symbols_fd(a, n, 2); }
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned f) { return cudaSuccess; }
EXPORT cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t c, void *d, unsigned f) { c(s, cudaSuccess, d); return cudaSuccess; }
EXPORT cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t f, void *d) { f(d); return cudaSuccess; }
EXPORT cudaError_t cudaEventCreate(cudaEvent_t *e) { *e = (cudaEvent_t)(handles += 16); return cudaSuccess; }
EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned f) { return cudaEventCreate(e); }
EXPORT cudaError_t cudaEventDestroy(cudaEvent_t e) { return cudaSuccess; }
EXPORT cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) { return cudaSuccess; }
EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned f) { return cudaSuccess; }
EXPORT cudaError_t cudaEventQuery(cudaEvent_t e) { return cudaSuccess; }
EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t e) { if (records_here()) return illegal("cudaEventSynchronize"); count("SYNC cudaEventSynchronize", 0); return cudaSuccess; }
EXPORT cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) { *ms = 1.0f; return cudaSuccess; }

// ---- graphs
EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *st) { *st = !(is_capturing && s == capturing) ? cudaStreamCaptureStatusNone : is_invalid ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive; return cudaSuccess; }
EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *st, unsigned long long *id, cudaGraph_t *g, const cudaGraphNode_t **dep, const cudaGraphEdgeData **e, size_t *n) {
  int c = is_capturing && s == capturing;
  *st = !c ? cudaStreamCaptureStatusNone : is_invalid ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive; if (id) *id = capture_id; if (g) *g = (cudaGraph_t)0x99; if (n) *n = 0; return cudaSuccess;
}
EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode m) { capturing = s; recorder = pthread_self(); is_capturing = 1; is_invalid = 0; capture_nodes = 0; capture_id++; count("capture begins", 0); return cudaSuccess; }
EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *g) {
  is_capturing = 0; if (is_invalid) { *g = NULL; return err(cudaErrorStreamCaptureInvalidated); }
  *g = (cudaGraph_t)(handles += 16); char b[100]; snprintf(b, 100, "capture ends with %llu nodes", (unsigned long long)capture_nodes); count(b, 0); return cudaSuccess; }
EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *m) { return cudaSuccess; }
EXPORT cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *e, cudaGraph_t g, unsigned long long f) { *e = (cudaGraphExec_t)(handles += 16); return cudaSuccess; }
EXPORT cudaError_t cudaGraphLaunch(cudaGraphExec_t e, cudaStream_t s) { count("cudaGraphLaunch", 0); return cudaSuccess; }
EXPORT cudaError_t cudaGraphGetNodes(cudaGraph_t g, cudaGraphNode_t *n, size_t *k) { *k = capture_nodes; return cudaSuccess; }
EXPORT cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t n, cudaGraphNode_t *d, cudaGraphEdgeData *e, size_t *k) { *k = 0; return cudaSuccess; }
EXPORT cudaError_t cudaGraphDestroy(cudaGraph_t g) { return cudaSuccess; }
EXPORT cudaError_t cudaGraphExecDestroy(cudaGraphExec_t g) { return cudaSuccess; }
EXPORT cudaError_t cudaGraphDebugDotPrint(cudaGraph_t g, const char *p, unsigned f) { return cudaSuccess; }

// ---- kernels
typedef struct { const void *fun; char *name; } Kernel;
static Kernel *kernels = NULL; static int num_kernels = 0, room = 0;
static Kernel **table = NULL; static int table_size = 0;
EXPORT void **__cudaRegisterFatBinary(void *b) { static void *h[4]; return h; }
EXPORT void __cudaRegisterFatBinaryEnd(void **h) {}
EXPORT void __cudaUnregisterFatBinary(void **h) {}
EXPORT char __cudaInitModule(void **h) { return 1; }
EXPORT void __cudaRegisterVar(void **h, char *hv, char *da, const char *dn, int e, size_t s, int c, int g) {}
EXPORT void __cudaRegisterFunction(void **h, const char *hf, char *df, const char *dn, int tl, uint3 *tid, uint3 *bid, dim3 *bd, dim3 *gd, int *ws) {
  if (num_kernels == room) { room = room ? room * 2 : 65536; kernels = realloc(kernels, room * sizeof(Kernel)); }
  kernels[num_kernels++] = (Kernel){hf, (char *)dn};
}
static int compare(const void *a, const void *b) { const Kernel *x = a, *y = b; return x->fun < y->fun ? -1 : x->fun > y->fun; }
static int sorted = 0;
static const char *name_of(const void *f) {
  if (sorted != num_kernels) { pthread_mutex_lock(&lock); qsort(kernels, num_kernels, sizeof(Kernel), compare); sorted = num_kernels; pthread_mutex_unlock(&lock); }
  Kernel key = {f, NULL}, *k = bsearch(&key, kernels, num_kernels, sizeof(Kernel), compare);
  return k ? k->name : "unknown kernel";
}
static void launched(const char *name, cudaStream_t st) { char b[400]; snprintf(b, 400, "kernel %s", name); count(b, 0); note_capture(st); }
EXPORT void fc_launched(const char *name, cudaStream_t st) { count(name, 0); note_capture(st); }  // by the driver: Triton
static __thread struct { dim3 g, b; size_t s; void *st; } config;
EXPORT unsigned __cudaPushCallConfiguration(dim3 g, dim3 b, size_t s, struct CUstream_st *st) { config.g = g; config.b = b; config.s = s; config.st = st; return 0; }
EXPORT cudaError_t __cudaPopCallConfiguration(dim3 *g, dim3 *b, size_t *s, void *st) { *g = config.g; *b = config.b; *s = config.s; *(void **)st = config.st; return cudaSuccess; }
static cudaError_t check(dim3 g, dim3 b, size_t s) {
  if (!g.x || !g.y || !g.z || g.y > 65535 || g.z > 65535 || b.x * b.y * b.z > 1024 || !b.x || s > 232448) { fprintf(stderr, "[fake] bad launch configuration %u %u %u / %u %u %u / %zu\n", g.x, g.y, g.z, b.x, b.y, b.z, s); return err(cudaErrorInvalidConfiguration); }
  return cudaSuccess;
}
EXPORT cudaError_t cudaLaunchKernel(const void *f, dim3 g, dim3 b, void **a, size_t s, cudaStream_t st) { launched(name_of(f), st); return check(g, b, s); }
EXPORT cudaError_t __cudaGetKernel(cudaKernel_t *k, const void *f) { *k = (cudaKernel_t)f; return cudaSuccess; }
EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t k, dim3 g, dim3 b, void **a, size_t s, cudaStream_t st) { launched(name_of((void *)k), st); return check(g, b, s); }
EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *f, void **a) { launched(name_of(f), c->stream); return check(c->gridDim, c->blockDim, c->dynamicSmemBytes); }
EXPORT cudaError_t cudaLaunchCooperativeKernel(const void *f, dim3 g, dim3 b, void **a, size_t s, cudaStream_t st) { launched(name_of(f), st); return check(g, b, s); }
EXPORT cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) {
  memset(a, 0, sizeof *a); a->maxThreadsPerBlock = 1024; a->numRegs = 64; a->ptxVersion = 90; a->binaryVersion = 90; a->maxDynamicSharedSizeBytes = 232448; return cudaSuccess; }
EXPORT cudaError_t cudaFuncSetAttribute(const void *f, enum cudaFuncAttribute a, int v) { return cudaSuccess; }
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int b, size_t s, unsigned fl) { *n = 2; return cudaSuccess; }
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *f, int b, size_t s) { *n = 2; return cudaSuccess; }

// ---- errors, others
EXPORT cudaError_t cudaGetLastError(void) { cudaError_t e = last; last = cudaSuccess; return e; }
EXPORT cudaError_t cudaPeekAtLastError(void) { return last; }
EXPORT const char *cudaGetErrorString(cudaError_t e) { static __thread char b[40]; if (!e) return "no error"; snprintf(b, 40, "fake CUDA error %d", e); return b; }
EXPORT const char *cudaGetErrorName(cudaError_t e) { return cudaGetErrorString(e); }
EXPORT cudaError_t cudaProfilerStart(void) { return cudaSuccess; }
EXPORT cudaError_t cudaProfilerStop(void) { return cudaSuccess; }
// CUPTI_ERROR_NOT_INITIALIZED: without times, as before; CUPTI 13.2 asks this driver for its tables without end
EXPORT int cuptiGetVersion(unsigned *version) { *version = 0; return 15; }
static int generic(void) { return 0; }
EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char *s, void **f, unsigned v, unsigned long long fl, enum cudaDriverEntryPointQueryResult *st) {
  static void *lib; if (!lib) lib = dlopen("libcuda.so.1", RTLD_LAZY);
  *f = lib ? dlsym(lib, s) : NULL; if (!*f) *f = (void *)generic; if (st) *st = cudaDriverEntryPointSuccess; return cudaSuccess; }
EXPORT cudaError_t cudaGetDriverEntryPoint(const char *s, void **f, unsigned long long fl, enum cudaDriverEntryPointQueryResult *st) { return cudaGetDriverEntryPointByVersion(s, f, 0, fl, st); }

// ---- cuBLAS
static int dummy_handle[1024];
EXPORT cublasStatus_t cublasCreate_v2(cublasHandle_t *h) { *h = (cublasHandle_t)dummy_handle; return 0; }
EXPORT cublasStatus_t cublasDestroy_v2(cublasHandle_t h) { return 0; }
static __thread cudaStream_t blas_stream;  // torch sets it before each product
EXPORT cublasStatus_t cublasSetStream_v2(cublasHandle_t h, cudaStream_t s) { blas_stream = s; return 0; }
EXPORT cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t h, void *w, size_t n) { return 0; }
EXPORT cublasStatus_t cublasSetMathMode(cublasHandle_t h, cublasMath_t m) { return 0; }
EXPORT cublasStatus_t cublasGetMathMode(cublasHandle_t h, cublasMath_t *m) { *m = 0; return 0; }
EXPORT cublasStatus_t cublasSetPointerMode_v2(cublasHandle_t h, cublasPointerMode_t m) { return 0; }
EXPORT cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t h, cublasPointerMode_t *m) { *m = 0; return 0; }
static void gemm_on(cudaStream_t st, const char *kind, long long m, long long n, long long k, long long batch, int type, int out) {
  char b[200]; snprintf(b, 200, "gemm %s m=%lld n=%lld k=%lld batch=%lld type=%d out=%d", kind, m, n, k, batch, type, out); count(b, (uint64_t)(2 * m * n * k * batch)); note_capture(st); }
#define gemm(...) gemm_on(blas_stream, __VA_ARGS__)
EXPORT cublasStatus_t cublasGemmEx(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k, const void *al, const void *A, cudaDataType At, int lda, const void *B, cudaDataType Bt, int ldb, const void *be, void *C, cudaDataType Ct, int ldc, cublasComputeType_t ct, cublasGemmAlgo_t algo) { gemm(ta ? (tb ? "TT" : "TN") : (tb ? "NT" : "NN"), m, n, k, 1, At, Ct); return 0; }
EXPORT cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k, const void *al, const void *A, cudaDataType At, int lda, long long sa, const void *B, cudaDataType Bt, int ldb, long long sb, const void *be, void *C, cudaDataType Ct, int ldc, long long sc, int batch, cublasComputeType_t ct, cublasGemmAlgo_t algo) { gemm(ta ? (tb ? "TT" : "TN") : (tb ? "NT" : "NN"), m, n, k, batch, At, Ct); return 0; }
EXPORT cublasStatus_t cublasSgemm_v2(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k, const float *al, const float *A, int lda, const float *B, int ldb, const float *be, float *C, int ldc) { gemm(ta ? (tb ? "TT" : "TN") : (tb ? "NT" : "NN"), m, n, k, 1, 0, 0); return 0; }
EXPORT cublasStatus_t cublasSgemmStridedBatched(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k, const float *al, const float *A, int lda, long long sa, const float *B, int ldb, long long sb, const float *be, float *C, int ldc, long long sc, int batch) { gemm(ta ? (tb ? "TT" : "TN") : (tb ? "NT" : "NN"), m, n, k, batch, 0, 0); return 0; }
EXPORT cublasStatus_t cublasSgemv_v2(cublasHandle_t h, cublasOperation_t ta, int m, int n, const float *al, const float *A, int lda, const float *x, int ix, const float *be, float *y, int iy) { gemm("gemv", m, 1, n, 1, 0, 0); return 0; }

typedef struct { int type; uint64_t rows, cols; int64_t ld; int batch; } Layout;
typedef struct { int compute, scale; int attr[64]; } Desc;
EXPORT size_t cublasLtGetVersion(void) { return 130100; }
EXPORT cublasStatus_t cublasLtCreate(cublasLtHandle_t *h) { *h = (cublasLtHandle_t)dummy_handle; return 0; }
EXPORT cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *l, cudaDataType t, uint64_t r, uint64_t c, int64_t ld) { Layout *x = calloc(1, sizeof *x); x->type = t; x->rows = r; x->cols = c; x->ld = ld; x->batch = 1; *l = (void *)x; return 0; }
EXPORT cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t l) { free(l); return 0; }
EXPORT cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t l, cublasLtMatrixLayoutAttribute_t a, const void *b, size_t n) { if (a == CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT) ((Layout *)l)->batch = *(int *)b; return 0; }
EXPORT cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *d, cublasComputeType_t c, cudaDataType s) { Desc *x = calloc(1, sizeof *x); x->compute = c; *d = (void *)x; return 0; }
EXPORT cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t d) { free(d); return 0; }
EXPORT cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t d, cublasLtMatmulDescAttributes_t a, const void *b, size_t n) { if (a < 64) ((Desc *)d)->attr[a] = *(int *)b; return 0; }
EXPORT cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *p) { *p = calloc(1, 64); return 0; }
EXPORT cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t p) { free(p); return 0; }
EXPORT cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t p, cublasLtMatmulPreferenceAttributes_t a, const void *b, size_t n) { return 0; }
EXPORT cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t h, cublasLtMatmulDesc_t d, cublasLtMatrixLayout_t A, cublasLtMatrixLayout_t B, cublasLtMatrixLayout_t C, cublasLtMatrixLayout_t D, cublasLtMatmulPreference_t p, int want, cublasLtMatmulHeuristicResult_t *r, int *n) { memset(r, 0, sizeof *r); *n = 1; return 0; }
EXPORT cublasStatus_t cublasLtMatmul(cublasLtHandle_t h, cublasLtMatmulDesc_t d, const void *al, const void *A, cublasLtMatrixLayout_t Al, const void *B, cublasLtMatrixLayout_t Bl, const void *be, const void *C, cublasLtMatrixLayout_t Cl, void *D, cublasLtMatrixLayout_t Dl, const cublasLtMatmulAlgo_t *algo, void *w, size_t ws, cudaStream_t st) {
  Layout *a = (void *)Al, *b = (void *)Bl, *o = (void *)Dl; Desc *x = (void *)d;
  int ta = x->attr[CUBLASLT_MATMUL_DESC_TRANSA];
  long long k = ta ? a->rows : a->cols; char kind[120];
  snprintf(kind, 120, "Lt ta=%d tb=%d ascale=%d bscale=%d epi=%d lda=%lld ldb=%lld alignA=%d", ta, x->attr[CUBLASLT_MATMUL_DESC_TRANSB], x->attr[CUBLASLT_MATMUL_DESC_A_SCALE_MODE], x->attr[CUBLASLT_MATMUL_DESC_B_SCALE_MODE], x->attr[CUBLASLT_MATMUL_DESC_EPILOGUE], (long long)a->ld, (long long)b->ld, (int)((uintptr_t)A % 16));
  gemm_on(st, kind, o->rows, o->cols, k, o->batch, a->type, o->type); return 0; }
