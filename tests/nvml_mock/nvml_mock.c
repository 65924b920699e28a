/* A driver library that answers from a file: a test double for libnvidia-ml.so.1.
 *
 * It knows the calls that the harness makes, and answers them from the scenario that
 * NVML_MOCK_SCENARIO names. The file is looked at before every call, so that a test can change
 * what is true while somebody measures. Without a file the driver is "not loaded".
 *
 * One statement a line; words are split at blanks, a '#' begins a comment:
 *
 *   driver 570.86.15                      version of the driver
 *   cuda 12080                            version of CUDA, 1000 * major + 10 * minor
 *   gpu UUID TOTAL RESERVED BASE NAME     a device; BASE bytes are in use by nobody
 *   mig PARENT UUID TOTAL RESERVED BASE NAME
 *   process UUID PID BYTES [KIND]         compute (default), graphics or mps; BYTES -1: untold
 *   capability UUID MAJOR MINOR           CUDA's compute capability (default 9 0)
 *   lost UUID                             it fell off the bus
 *   fail CALL CODE [UUID]                 CALL answers CODE, for that device or for all
 *   slow CALL MILLISECONDS [UUID]         CALL takes that long
 *
 * With -DFIRST_CALLS_ONLY it is an old driver: what came later is not in the library.
 */
#include <pthread.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

enum {
    SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7, DRIVER_NOT_LOADED = 9, GPU_IS_LOST = 15, VERSION_MISMATCH = 25
};

typedef struct { unsigned long long total, free, used; } memory_v1;
typedef struct { unsigned int version; unsigned long long total, reserved, free, used; } memory_v2;
typedef struct {
    unsigned int pid;
    unsigned long long usedGpuMemory;
    unsigned int gpuInstanceId, computeInstanceId;
} process_info;
#define MEMORY_V2 ((unsigned int)(sizeof(memory_v2) | (2u << 24)))

/* What the tests compare with the binding's own structures. */
typedef struct { const char *structure, *field; unsigned int offset, size; } layout;
#define FIELD(type, name) {#type, #name, offsetof(type, name), sizeof(((type *)0)->name)}
#define WHOLE(type) {#type, "", 0, sizeof(type)}
const layout nvml_mock_layouts[] = {
    WHOLE(memory_v1), FIELD(memory_v1, total), FIELD(memory_v1, free), FIELD(memory_v1, used),
    WHOLE(memory_v2), FIELD(memory_v2, version), FIELD(memory_v2, total),
    FIELD(memory_v2, reserved), FIELD(memory_v2, free), FIELD(memory_v2, used),
    WHOLE(process_info), FIELD(process_info, pid), FIELD(process_info, usedGpuMemory),
    FIELD(process_info, gpuInstanceId), FIELD(process_info, computeInstanceId),
};
const unsigned int nvml_mock_layout_count = sizeof nvml_mock_layouts / sizeof *nvml_mock_layouts;
const unsigned int nvml_mock_memory_v2 = MEMORY_V2;

#define UUID 96
#define MANY 256
typedef struct {
    char uuid[UUID], parent[UUID], name[96];
    unsigned long long total, reserved, base;
    int lost, major, minor;
} device;
typedef struct { char uuid[UUID]; unsigned int pid; long long bytes; char kind[16]; } process;
typedef struct { char call[64], uuid[UUID]; int value; } rule;

static struct {
    char driver[96];
    int cuda, devices, processes, failures, delays;
    device device[MANY];
    process process[MANY];
    rule failure[MANY], delay[MANY];
} now;
static int loaded, sessions;
static struct stat seen;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* A handle outlives every change of the file: it is a name and nothing else. */
static char handles[MANY][UUID];
static int handle_count;

static const char *handle_of(const char *uuid) {
    for (int i = 0; i < handle_count; i++)
        if (!strcmp(handles[i], uuid)) return handles[i];
    if (handle_count == MANY) return NULL;
    strncpy(handles[handle_count], uuid, UUID - 1);
    return handles[handle_count++];
}

static device *find(const char *uuid) {
    for (int i = 0; uuid && i < now.devices; i++)
        if (!strcmp(now.device[i].uuid, uuid)) return &now.device[i];
    return NULL;
}

static void rest_of(char *to, size_t size, const char *line, int words) {
    while (words--) {
        line += strspn(line, " \t");
        line += strcspn(line, " \t\n");
    }
    line += strspn(line, " \t");
    snprintf(to, size, "%.*s", (int)strcspn(line, "\n"), line);
}

static void statement(const char *line) {
    char a[UUID] = "", b[UUID] = "", kind[16] = "compute";
    unsigned long long t, r, u;
    long long n;
    int number;
    if (sscanf(line, "driver %95s", now.driver) == 1) return;
    if (sscanf(line, "cuda %d", &now.cuda) == 1) return;
    if (now.devices < MANY && sscanf(line, "gpu %95s %llu %llu %llu", a, &t, &r, &u) == 4) {
        device *d = &now.device[now.devices++];
        memset(d, 0, sizeof *d);
        d->major = 9;
        strcpy(d->uuid, a);
        d->total = t, d->reserved = r, d->base = u;
        rest_of(d->name, sizeof d->name, line, 5);
    } else if (now.devices < MANY &&
               sscanf(line, "mig %95s %95s %llu %llu %llu", a, b, &t, &r, &u) == 5) {
        device *d = &now.device[now.devices++];
        memset(d, 0, sizeof *d);
        d->major = 9;
        strcpy(d->parent, a), strcpy(d->uuid, b);
        d->total = t, d->reserved = r, d->base = u;
        rest_of(d->name, sizeof d->name, line, 6);
    } else if (now.processes < MANY &&
               sscanf(line, "process %95s %d %lld %15s", a, &number, &n, kind) >= 3) {
        process *p = &now.process[now.processes++];
        strcpy(p->uuid, a), strcpy(p->kind, kind);
        p->pid = (unsigned int)number, p->bytes = n;
    } else if (sscanf(line, "capability %95s %d", a, &number) == 2) {
        device *d = find(a);
        if (d) sscanf(line, "capability %*s %d %d", &d->major, &d->minor);
    } else if (sscanf(line, "lost %95s", a) == 1) {
        device *d = find(a);
        if (d) d->lost = 1;
    } else if (now.failures < MANY && sscanf(line, "fail %63s %d %95s", a, &number, b) >= 2) {
        rule *f = &now.failure[now.failures++];
        strcpy(f->call, a), strcpy(f->uuid, b);
        f->value = number;
    } else if (now.delays < MANY && sscanf(line, "slow %63s %d %95s", a, &number, b) >= 2) {
        rule *f = &now.delay[now.delays++];
        strcpy(f->call, a), strcpy(f->uuid, b);
        f->value = number;
    }
}

static void look(void) {
    const char *path = getenv("NVML_MOCK_SCENARIO");
    struct stat found;
    if (!path || stat(path, &found)) {
        loaded = 0;
        return;
    }
    if (loaded && found.st_ino == seen.st_ino && found.st_size == seen.st_size &&
        found.st_mtim.tv_sec == seen.st_mtim.tv_sec &&
        found.st_mtim.tv_nsec == seen.st_mtim.tv_nsec)
        return;
    FILE *file = fopen(path, "r");
    char line[512];
    memset(&now, 0, sizeof now);
    loaded = file != NULL;
    if (!file) return;
    seen = found;
    while (fgets(line, sizeof line, file))
        if (line[0] != '#') statement(line);
    fclose(file);
}

static int applies(const rule *r, const char *call, const char *uuid) {
    return !strcmp(r->call, call) && (!r->uuid[0] || (uuid && !strcmp(r->uuid, uuid)));
}

/* Looks at the file, waits and fails as it says, and finds the device where there is one.
 * On success the lock is held. */
static int begin(const char *call, const char *uuid, device **d, int needs_session) {
    int wait = 0, result = SUCCESS;
    pthread_mutex_lock(&lock);
    look();
    for (int i = 0; i < now.delays; i++)
        if (applies(&now.delay[i], call, uuid)) wait = now.delay[i].value;
    if (wait) {
        struct timespec for_ms = {wait / 1000, wait % 1000 * 1000000L};
        pthread_mutex_unlock(&lock);
        nanosleep(&for_ms, NULL);
        pthread_mutex_lock(&lock);
        look();
    }
    if (!loaded) result = DRIVER_NOT_LOADED;
    else if (needs_session && !sessions) result = UNINITIALIZED;
    for (int i = 0; result == SUCCESS && i < now.failures; i++)
        if (applies(&now.failure[i], call, uuid)) result = now.failure[i].value;
    if (result == SUCCESS && d) {
        *d = find(uuid);
        device *whole = *d && (*d)->parent[0] ? find((*d)->parent) : NULL;
        if (!*d) result = INVALID_ARGUMENT;
        else if ((*d)->lost || (whole && whole->lost)) result = GPU_IS_LOST;
    }
    if (result != SUCCESS) pthread_mutex_unlock(&lock);
    return result;
}

#define BEGIN(uuid, d)                                     \
    do {                                                   \
        int result_ = begin(__func__, (uuid), (d), 1);     \
        if (result_ != SUCCESS) return result_;            \
    } while (0)
#define END(result)                    \
    do {                               \
        pthread_mutex_unlock(&lock);   \
        return (result);               \
    } while (0)

int nvmlInitWithFlags(unsigned int flags) {
    (void)flags;
    int result = begin(__func__, NULL, NULL, 0);
    if (result != SUCCESS) return result;
    sessions++;
    END(SUCCESS);
}
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }

int nvmlShutdown(void) {
    pthread_mutex_lock(&lock);
    if (!sessions) END(UNINITIALIZED);
    sessions--;
    END(SUCCESS);
}

const char *nvmlErrorString(int code) {
    static char words[64];
    snprintf(words, sizeof words, "error %d of the mock driver", code);
    return words;
}

int nvmlSystemGetDriverVersion(char *to, unsigned int size) {
    BEGIN(NULL, NULL);
    snprintf(to, size, "%s", now.driver);
    END(SUCCESS);
}

int nvmlSystemGetCudaDriverVersion_v2(int *version) {
    BEGIN(NULL, NULL);
    *version = now.cuda;
    END(SUCCESS);
}

int nvmlDeviceGetCount_v2(unsigned int *count) {
    BEGIN(NULL, NULL);
    *count = 0;
    for (int i = 0; i < now.devices; i++) *count += !now.device[i].parent[0];
    END(SUCCESS);
}

int nvmlDeviceGetHandleByIndex_v2(unsigned int index, const char **handle) {
    BEGIN(NULL, NULL);
    for (int i = 0; i < now.devices; i++)
        if (!now.device[i].parent[0] && !index--) {
            *handle = handle_of(now.device[i].uuid);
            END(now.device[i].lost ? GPU_IS_LOST : SUCCESS);
        }
    END(INVALID_ARGUMENT);
}

int nvmlDeviceGetHandleByUUID(const char *uuid, const char **handle) {
    BEGIN(uuid, NULL);
    device *d = find(uuid);
    if (!d) END(NOT_FOUND);
    *handle = handle_of(uuid);
    END(d->lost ? GPU_IS_LOST : SUCCESS);
}

int nvmlDeviceGetUUID(const char *handle, char *to, unsigned int size) {
    device *d;
    BEGIN(handle, &d);
    snprintf(to, size, "%s", d->uuid);
    END(SUCCESS);
}

int nvmlDeviceGetName(const char *handle, char *to, unsigned int size) {
    device *d;
    BEGIN(handle, &d);
    snprintf(to, size, "%s", d->name);
    END(SUCCESS);
}

int nvmlDeviceGetCudaComputeCapability(const char *handle, int *major, int *minor) {
    device *d;
    BEGIN(handle, &d);
    *major = d->major;
    *minor = d->minor;
    END(SUCCESS);
}

static int instances_of(const char *uuid) {
    int count = 0;
    for (int i = 0; i < now.devices; i++) count += !strcmp(now.device[i].parent, uuid);
    return count;
}

int nvmlDeviceGetMigMode(const char *handle, unsigned int *current, unsigned int *pending) {
    device *d;
    BEGIN(handle, &d);
    if (d->parent[0]) END(INVALID_ARGUMENT);
    *current = *pending = instances_of(d->uuid) > 0;
    END(SUCCESS);
}

int nvmlDeviceGetMaxMigDeviceCount(const char *handle, unsigned int *count) {
    device *d;
    BEGIN(handle, &d);
    *count = 7;
    END(SUCCESS);
}

int nvmlDeviceGetMigDeviceHandleByIndex(const char *handle, unsigned int index, const char **mig) {
    device *d;
    BEGIN(handle, &d);
    for (int i = 0; i < now.devices; i++)
        if (!strcmp(now.device[i].parent, d->uuid) && !index--) {
            *mig = handle_of(now.device[i].uuid);
            END(SUCCESS);
        }
    END(NOT_FOUND);
}

/* What is in use: by processes on the device, and on its instances. */
static unsigned long long in_use(const device *d) {
    unsigned long long sum = d->base;
    for (int i = 0; i < now.processes; i++)
        if (!strcmp(now.process[i].uuid, d->uuid) && now.process[i].bytes > 0)
            sum += (unsigned long long)now.process[i].bytes;
    for (int i = 0; i < now.devices; i++)
        if (!strcmp(now.device[i].parent, d->uuid)) sum += in_use(&now.device[i]);
    return sum > d->total - d->reserved ? d->total - d->reserved : sum;
}

/* The first version counts what the driver reserves as used. */
int nvmlDeviceGetMemoryInfo(const char *handle, memory_v1 *told) {
    device *d;
    BEGIN(handle, &d);
    told->total = d->total;
    told->used = in_use(d) + d->reserved;
    told->free = told->total - told->used;
    END(SUCCESS);
}

#ifndef FIRST_CALLS_ONLY
int nvmlDeviceGetMemoryInfo_v2(const char *handle, memory_v2 *told) {
    device *d;
    BEGIN(handle, &d);
    if (told->version != MEMORY_V2) END(VERSION_MISMATCH);
    told->total = d->total;
    told->reserved = d->reserved;
    told->used = in_use(d);
    told->free = told->total - told->reserved - told->used;
    END(SUCCESS);
}
#endif

static int tell_processes(const device *d, const char *kind, unsigned int *count,
                          process_info *told) {
    unsigned int room = *count, found = 0;
    for (int i = 0; i < now.processes; i++) {
        const process *p = &now.process[i];
        if (strcmp(p->uuid, d->uuid) || strcmp(p->kind, kind)) continue;
        if (told && found < room) {
            told[found].pid = p->pid;
            told[found].usedGpuMemory = (unsigned long long)p->bytes;
            told[found].gpuInstanceId = told[found].computeInstanceId = 0xFFFFFFFFu;
        }
        found++;
    }
    *count = found;
    return found > room ? INSUFFICIENT_SIZE : SUCCESS;
}

#define PROCESSES(name, kind)                                                     \
    int name(const char *handle, unsigned int *count, process_info *told) {       \
        device *d;                                                                \
        BEGIN(handle, &d);                                                        \
        END(tell_processes(d, kind, count, told));                                \
    }
PROCESSES(nvmlDeviceGetComputeRunningProcesses_v2, "compute")
PROCESSES(nvmlDeviceGetGraphicsRunningProcesses_v2, "graphics")
#ifndef FIRST_CALLS_ONLY
PROCESSES(nvmlDeviceGetComputeRunningProcesses_v3, "compute")
PROCESSES(nvmlDeviceGetGraphicsRunningProcesses_v3, "graphics")
PROCESSES(nvmlDeviceGetMPSComputeRunningProcesses_v3, "mps")
#endif
