/* A stand-in for NVIDIA's NVML, so that the real pynvml, ctypes and dynamic loader run in tests on any machine.
 *
 * What it plays comes from the environment:
 *   FAKE_NVML_GPUS=4          how many GPUs there are (1)
 *   FAKE_NVML_MODEL=gb10      which model: rtx4090 (default), a100, gb10, orin
 *   FAKE_NVML_NAME=…          what its name is, and
 *   FAKE_NVML_MIB=8188        how much memory it has, where that is not the model's
 *   FAKE_NVML_MIG=2           GPU 0 is in MIG mode with that many instances, with a gap in their numbers
 *   FAKE_NVML_FAIL=F:15,F@2:3 function F fails with NVML error 15; on GPU 2 with 3; `hang` and `crash` for a number
 *   FAKE_NVML_TRACE=1         write each start and stop of the library to stderr
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6 };

typedef struct { int index; int instance; } Gpu; /* instance -1: the whole GPU */
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct {
    char legacy[16];
    unsigned domain, bus, device, device_id, subsystem_id;
    char bus_id[32];
} Pci;

static Gpu gpus[16], instances[16][8];

static int number(const char *name, int otherwise) {
    const char *text = getenv(name);
    return text ? atoi(text) : otherwise;
}

static int model(const char *name) {
    const char *text = getenv("FAKE_NVML_MODEL");
    return strcmp(text ? text : "rtx4090", name) == 0;
}

/* GPUs that share the system's memory do not answer what theirs is. */
static int unified(void) { return model("gb10") || model("orin"); }

static int act(const char *order) {
    if (strncmp(order, "hang", 4) == 0) for (;;) pause();
    if (strncmp(order, "crash", 5) == 0) raise(SIGSEGV);
    return atoi(order);
}

static int failure(const char *function, int index) {
    char plan[512], exact[128], *rest = plan, *item;
    const char *given = getenv("FAKE_NVML_FAIL");
    snprintf(plan, sizeof plan, "%s", given ? given : "");
    snprintf(exact, sizeof exact, "%s@%d", function, index);
    while ((item = strsep(&rest, ","))) {
        char *order = strchr(item, ':');
        if (!order) continue;
        *order++ = 0;
        if (strcmp(item, function) == 0 || strcmp(item, exact) == 0) return act(order);
    }
    return SUCCESS;
}

#define FAIL(index) do { int code = failure(__func__, index); if (code) return code; } while (0)

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    if (getenv("FAKE_NVML_TRACE")) fprintf(stderr, "started\n");
    FAIL(-1);
    return SUCCESS;
}
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) {
    if (getenv("FAKE_NVML_TRACE")) fprintf(stderr, "stopped\n");
    FAIL(-1);
    return SUCCESS;
}
const char *nvmlErrorString(int code) { (void)code; return "An error of the stand-in"; }

int nvmlSystemGetDriverVersion(char *text, unsigned size) {
    FAIL(-1);
    snprintf(text, size, "580.126.09");
    return SUCCESS;
}
int nvmlSystemGetCudaDriverVersion_v2(int *version) { FAIL(-1); *version = 13000; return SUCCESS; }

int nvmlDeviceGetCount_v2(unsigned *count) { FAIL(-1); *count = number("FAKE_NVML_GPUS", 1); return SUCCESS; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, Gpu **gpu) {
    FAIL((int)index);
    if (index >= 16) return INVALID_ARGUMENT;
    gpus[index] = (Gpu){(int)index, -1};
    *gpu = &gpus[index];
    return SUCCESS;
}
int nvmlDeviceGetName(Gpu *gpu, char *text, unsigned size) {
    const char *name = model("gb10") ? "NVIDIA GB10" : model("a100") ? "NVIDIA A100-SXM4-40GB" : "NVIDIA GeForce RTX 4090";
    const char *given = getenv("FAKE_NVML_NAME");
    if (given) name = given;
    FAIL(gpu->index);
    if (gpu->instance < 0) snprintf(text, size, "%s", name);
    else snprintf(text, size, "%s MIG 1g.5gb", name);
    return SUCCESS;
}
int nvmlDeviceGetUUID(Gpu *gpu, char *text, unsigned size) {
    FAIL(gpu->index);
    if (gpu->instance < 0) snprintf(text, size, "GPU-00000000-1111-2222-3333-%012d", gpu->index);
    else snprintf(text, size, "MIG-00000000-1111-2222-3333-%08d%04d", gpu->index, gpu->instance);
    return SUCCESS;
}
int nvmlDeviceGetMemoryInfo(Gpu *gpu, Memory *memory) {
    unsigned long long mib = gpu->instance >= 0 ? 4864 : number("FAKE_NVML_MIB", model("a100") ? 40960 : 24564);
    FAIL(gpu->index);
    if (unified()) return NOT_SUPPORTED;
    memory->total = mib << 20;
    memory->used = 512ull << 20;
    memory->free = memory->total - memory->used;
    return SUCCESS;
}
int nvmlDeviceGetCudaComputeCapability(Gpu *gpu, int *major, int *minor) {
    FAIL(gpu->index);
    *major = model("gb10") ? 12 : 8;
    *minor = model("gb10") ? 1 : model("orin") ? 7 : model("a100") ? 0 : 9;
    return SUCCESS;
}
int nvmlDeviceGetArchitecture(Gpu *gpu, unsigned *number) {
    FAIL(gpu->index);
    *number = model("gb10") ? 10 : model("a100") || model("orin") ? 7 : 8;
    return SUCCESS;
}
int nvmlDeviceGetPciInfo_v3(Gpu *gpu, Pci *pci) {
    FAIL(gpu->index);
    memset(pci, 0, sizeof *pci);
    if (model("gb10")) snprintf(pci->bus_id, sizeof pci->bus_id, "0000000F:01:00.0");
    else snprintf(pci->bus_id, sizeof pci->bus_id, "00000000:%02X:00.0", gpu->index + 1);
    return SUCCESS;
}
int nvmlDeviceGetPowerManagementLimit(Gpu *gpu, unsigned *milliwatts) {
    FAIL(gpu->index);
    if (unified()) return NOT_SUPPORTED;
    *milliwatts = model("a100") ? 400000 : 450000;
    return SUCCESS;
}
int nvmlDeviceGetEccMode(Gpu *gpu, unsigned *current, unsigned *pending) {
    FAIL(gpu->index);
    if (!model("a100")) return NOT_SUPPORTED;
    *current = *pending = 1;
    return SUCCESS;
}
int nvmlDeviceGetMigMode(Gpu *gpu, unsigned *current, unsigned *pending) {
    FAIL(gpu->index);
    if (!model("a100")) return NOT_SUPPORTED;
    *current = *pending = gpu->index == 0 && getenv("FAKE_NVML_MIG") ? 1 : 0;
    return SUCCESS;
}
int nvmlDeviceGetMaxMigDeviceCount(Gpu *gpu, unsigned *count) { FAIL(gpu->index); *count = 7; return SUCCESS; }
int nvmlDeviceGetMigDeviceHandleByIndex(Gpu *gpu, unsigned place, Gpu **instance) {
    int wanted = number("FAKE_NVML_MIG", 0);
    FAIL(gpu->index);
    /* Place 1 stays empty: instances are made and removed, and what remains keeps its number. */
    if (place >= 7 || place == 1 || (int)place > wanted || (int)place + (place == 0) > wanted) return NOT_FOUND;
    instances[gpu->index][place] = (Gpu){gpu->index, (int)place};
    *instance = &instances[gpu->index][place];
    return SUCCESS;
}
