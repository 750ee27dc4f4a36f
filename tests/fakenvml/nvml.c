/* A stand-in for libnvidia-ml.so.1, so that the production telemetry path runs where there is no
 * GPU.
 *
 * Problem: an agent with a simulated probe tests the simulated probe. The binding (nvidia-ml-py),
 * its structures, its error codes and its lazily resolved symbols are where telemetry breaks, so
 * they must be in the loop. This library has NVML's names, layouts and return codes (NVML API
 * Reference Guide, docs.nvidia.com/deploy/nvml-api); the binding loads it by soname like the real
 * one.
 *
 * What the GPUs are and how they do is a text file named by BATON_FAKENVML_FILE. One line per
 * thing, `#` for comments:
 *
 *   driver version=550.54.15 state=ok
 *   gpu uuid=GPU-... name="NVIDIA H200" memory_bytes=150754820096 power_mw=310000 ...
 *
 * Keys of `gpu`: uuid, name, memory_bytes (needed); memory_reserved_bytes; utilization_percent,
 * memory_used_bytes, temperature_celsius, power_mw, energy_mj, sm_clock_mhz, memory_clock_mhz (one
 * that is absent is NOT_SUPPORTED); state=ok|lost|reset_required|hangs; unsupported=power,energy;
 * failing=power:999 (field:return code); processes=PID:BYTES,... Fields are named utilization
 * memory temperature power energy sm_clock memory_clock. `pci_bus=59` is the number of its bus,
 * `recovery_action=1` what field 230 says (absent: NOT_SUPPORTED), `rows=ok|pending|failed` what
 * remapping does (absent likewise). `xids=1:95,2:79` are its errors, each with a number that grows:
 * who waits for events gets those with a higher one than any that was there when he began to wait.
 * `driver` has state=ok|not_loaded|mismatch|hangs.
 *
 * What hangs blocks its callers, and nobody else, until the file says otherwise: a GPU in every
 * call about it, the driver in every call.
 *
 * The file is read again when it is another one (device, inode, mtime, size), so a running process
 * sees a GPU fall off the bus. The file last read is kept open: its inode cannot be given to the
 * next one, so a change is never missed, however quickly two follow each other. A handle stands for
 * a UUID, not for a place in the file: a GPU that is no longer listed answers GPU_IS_LOST. A file
 * that does not parse is reported on stderr, and the state before it stays. No file: the driver is
 * not loaded.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

enum {
    MAX_GPUS = 64,      /* four times the largest box there is (16 GPUs) */
    MAX_HANDLES = 256,  /* UUIDs ever seen by one process: four complete changes of the fleet */
    MAX_PROCESSES = 32, /* per GPU; more than any share is cut into */
    LOOK_AGAIN_US = 1000, /* how soon a call that hangs sees that it need not */
    MAX_FILE_BYTES = 1 << 18, /* MAX_GPUS lines of 4 KiB */
    MAX_XIDS = 64,   /* per GPU in one file; a storm is written in pieces */
    LOOK_FOR_EVENTS_US = 10000, /* how late an event may be; the driver interrupts */
    XID_EVENT = 8,   /* nvmlEventTypeXidCriticalError */
    RECOVERY_ACTION = 230, /* NVML_FI_DEV_GET_GPU_RECOVERY_ACTION */
    TEXT_BYTES = 96, /* NVML_DEVICE_UUID_V2_BUFFER_SIZE and NVML_DEVICE_NAME_V2_BUFFER_SIZE */
};

enum result { /* nvmlReturn_t, the part that is used here */
    SUCCESS = 0,
    UNINITIALIZED = 1,
    INVALID_ARGUMENT = 2,
    NOT_SUPPORTED = 3,
    NOT_FOUND = 6,
    TIMEOUT = 10,
    INSUFFICIENT_SIZE = 7,
    DRIVER_NOT_LOADED = 9,
    GPU_IS_LOST = 15,
    RESET_REQUIRED = 16,
    LIB_RM_VERSION_MISMATCH = 18,
    ARGUMENT_VERSION_MISMATCH = 25,
    UNKNOWN = 999,
};

enum field { UTILIZATION, MEMORY, TEMPERATURE, POWER, ENERGY, SM_CLOCK, MEMORY_CLOCK, FIELD_COUNT };
static const char *const field_names[FIELD_COUNT] = {
    "utilization", "memory", "temperature", "power", "energy", "sm_clock", "memory_clock"};
static const char *const field_keys[FIELD_COUNT] = {
    "utilization_percent", "memory_used_bytes", "temperature_celsius", "power_mw",
    "energy_mj",           "sm_clock_mhz",      "memory_clock_mhz"};

struct process { /* nvmlProcessInfo_v2_t, the layout that GetComputeRunningProcesses_v3 fills */
    unsigned pid;
    unsigned long long used_memory_bytes;
    unsigned gpu_instance_id;
    unsigned compute_instance_id;
};

struct xid {
    uint64_t number, code;
};

struct gpu {
    char uuid[TEXT_BYTES];
    char name[TEXT_BYTES];
    uint64_t memory_bytes;
    uint64_t memory_reserved_bytes;
    uint64_t value[FIELD_COUNT];
    int result[FIELD_COUNT];
    int state;
    int hangs;
    unsigned process_count;
    struct process processes[MAX_PROCESSES];
    uint64_t pci_bus;
    uint64_t recovery_action;
    int recovery_result;
    int rows_result, rows_pending, rows_failed;
    unsigned xid_count;
    struct xid xids[MAX_XIDS];
};

struct fleet {
    char driver_version[TEXT_BYTES];
    int driver_result;
    int driver_hangs;
    unsigned gpu_count;
    struct gpu gpus[MAX_GPUS];
};

struct handle {
    char uuid[TEXT_BYTES];
};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER; /* guards everything below */
static unsigned init_count;
static struct fleet current, parsed;
static struct handle handles[MAX_HANDLES];
static unsigned handle_count;
static int file_descriptor = -1;
static struct stat file_status;
static char file_text[MAX_FILE_BYTES + 1];

/* ---- the file ---- */

/* Cuts the next key=value or key="value" out of the line: 1 found, 0 end of line, -1 malformed. */
static int next_pair(char **cursor, char **key, char **value) {
    char *at = *cursor + strspn(*cursor, " \t\r");
    if (*at == '\0') return 0;
    *key = at;
    at += strcspn(at, "= \t\"");
    if (*at != '=' || at == *key) return -1;
    *at++ = '\0';
    const char *stop = " \t\r";
    if (*at == '"') {
        stop = "\"";
        at++;
    }
    *value = at;
    at += strcspn(at, stop);
    if (*stop == '"' && *at != '"') return -1;
    if (*at != '\0') *at++ = '\0';
    *cursor = at;
    return 1;
}

static int parse_number(const char *text, uint64_t *number) {
    char *end;
    if (*text < '0' || *text > '9') return -1;
    errno = 0;
    unsigned long long parsed_number = strtoull(text, &end, 10);
    if (*end != '\0' || errno != 0) return -1;
    *number = parsed_number;
    return 0;
}

static int parse_text(const char *text, char target[TEXT_BYTES]) {
    size_t length_bytes = strlen(text);
    if (length_bytes == 0 || length_bytes >= TEXT_BYTES) return -1;
    memcpy(target, text, length_bytes + 1);
    return 0;
}

static int field_by(const char *const names[FIELD_COUNT], const char *text) {
    for (int field = 0; field < FIELD_COUNT; field++)
        if (strcmp(names[field], text) == 0) return field;
    return -1;
}

/* `power,energy` (with_code 0: NOT_SUPPORTED) or `power:999,energy:10` (with_code 1). */
static int parse_failures(char *text, int with_code, struct gpu *gpu) {
    char *rest = NULL;
    for (char *item = strtok_r(text, ",", &rest); item; item = strtok_r(NULL, ",", &rest)) {
        uint64_t code = NOT_SUPPORTED;
        char *colon = strchr(item, ':');
        if ((colon != NULL) != with_code) return -1;
        if (colon != NULL) {
            *colon = '\0';
            if (parse_number(colon + 1, &code) != 0 || code > UNKNOWN) return -1;
        }
        int field = field_by(field_names, item);
        if (field < 0) return -1;
        gpu->result[field] = (int)code;
    }
    return 0;
}

static int parse_processes(char *text, struct gpu *gpu) {
    char *rest = NULL;
    for (char *item = strtok_r(text, ",", &rest); item; item = strtok_r(NULL, ",", &rest)) {
        uint64_t pid, used_bytes;
        char *colon = strchr(item, ':');
        if (colon == NULL || gpu->process_count == MAX_PROCESSES) return -1;
        *colon = '\0';
        if (parse_number(item, &pid) != 0 || parse_number(colon + 1, &used_bytes) != 0) return -1;
        struct process *process = &gpu->processes[gpu->process_count++];
        process->pid = (unsigned)pid;
        process->used_memory_bytes = used_bytes;
        process->gpu_instance_id = process->compute_instance_id =
            0xFFFFFFFFu; /* not a MIG instance */
    }
    return 0;
}

static int parse_xids(char *text, struct gpu *gpu) {
    char *rest = NULL;
    for (char *item = strtok_r(text, ",", &rest); item; item = strtok_r(NULL, ",", &rest)) {
        char *colon = strchr(item, ':');
        if (colon == NULL || gpu->xid_count == MAX_XIDS) return -1;
        *colon = '\0';
        struct xid *xid = &gpu->xids[gpu->xid_count++];
        if (parse_number(item, &xid->number) != 0 || parse_number(colon + 1, &xid->code) != 0)
            return -1;
    }
    return 0;
}

static int parse_rows(const char *text, struct gpu *gpu) {
    gpu->rows_result = SUCCESS;
    gpu->rows_pending = strcmp(text, "pending") == 0;
    gpu->rows_failed = strcmp(text, "failed") == 0;
    return gpu->rows_pending || gpu->rows_failed || strcmp(text, "ok") == 0 ? 0 : -1;
}

static int parse_gpu_pair(const char *key, char *value, struct gpu *gpu,
                          int explicit_result[FIELD_COUNT]) {
    int field = field_by(field_keys, key);
    if (field >= 0) {
        explicit_result[field] = SUCCESS;
        return parse_number(value, &gpu->value[field]);
    }
    if (strcmp(key, "uuid") == 0) return parse_text(value, gpu->uuid);
    if (strcmp(key, "name") == 0) return parse_text(value, gpu->name);
    if (strcmp(key, "memory_bytes") == 0) return parse_number(value, &gpu->memory_bytes);
    if (strcmp(key, "memory_reserved_bytes") == 0)
        return parse_number(value, &gpu->memory_reserved_bytes);
    if (strcmp(key, "unsupported") == 0) return parse_failures(value, 0, gpu);
    if (strcmp(key, "failing") == 0) return parse_failures(value, 1, gpu);
    if (strcmp(key, "processes") == 0) return parse_processes(value, gpu);
    if (strcmp(key, "xids") == 0) return parse_xids(value, gpu);
    if (strcmp(key, "rows") == 0) return parse_rows(value, gpu);
    if (strcmp(key, "pci_bus") == 0) return parse_number(value, &gpu->pci_bus);
    if (strcmp(key, "recovery_action") == 0) {
        gpu->recovery_result = SUCCESS;
        return parse_number(value, &gpu->recovery_action);
    }
    if (strcmp(key, "state") != 0) return -1;
    if (strcmp(value, "ok") == 0) gpu->state = SUCCESS;
    else if (strcmp(value, "lost") == 0) gpu->state = GPU_IS_LOST;
    else if (strcmp(value, "reset_required") == 0) gpu->state = RESET_REQUIRED;
    else if (strcmp(value, "hangs") == 0) gpu->hangs = 1;
    else return -1;
    return 0;
}

static int parse_gpu(char *cursor, struct fleet *fleet) {
    char *key, *value;
    int more, given[FIELD_COUNT];
    if (fleet->gpu_count == MAX_GPUS) return -1;
    struct gpu *gpu = &fleet->gpus[fleet->gpu_count];
    memset(gpu, 0, sizeof *gpu);
    gpu->recovery_result = gpu->rows_result = NOT_SUPPORTED;
    gpu->pci_bus = fleet->gpu_count + 1;
    for (int field = 0; field < FIELD_COUNT; field++)
        given[field] = NOT_SUPPORTED;
    while ((more = next_pair(&cursor, &key, &value)) > 0)
        if (parse_gpu_pair(key, value, gpu, given) != 0) return -1;
    if (more < 0 || gpu->uuid[0] == '\0' || gpu->name[0] == '\0' || gpu->memory_bytes == 0)
        return -1;
    for (unsigned other = 0; other < fleet->gpu_count; other++)
        if (strcmp(fleet->gpus[other].uuid, gpu->uuid) == 0) return -1;
    /* what `unsupported` and `failing` said wins over a value; no value and no word is
     * NOT_SUPPORTED */
    for (int field = 0; field < FIELD_COUNT; field++)
        if (gpu->result[field] == SUCCESS) gpu->result[field] = given[field];
    fleet->gpu_count++;
    return 0;
}

static int parse_driver(char *cursor, struct fleet *fleet) {
    char *key, *value;
    int more;
    while ((more = next_pair(&cursor, &key, &value)) > 0) {
        if (strcmp(key, "version") == 0) {
            if (parse_text(value, fleet->driver_version) != 0) return -1;
        } else if (strcmp(key, "state") == 0 && strcmp(value, "ok") == 0) {
            fleet->driver_result = SUCCESS;
        } else if (strcmp(key, "state") == 0 && strcmp(value, "not_loaded") == 0) {
            fleet->driver_result = DRIVER_NOT_LOADED;
        } else if (strcmp(key, "state") == 0 && strcmp(value, "mismatch") == 0) {
            fleet->driver_result = LIB_RM_VERSION_MISMATCH;
        } else if (strcmp(key, "state") == 0 && strcmp(value, "hangs") == 0) {
            fleet->driver_hangs = 1;
        } else {
            return -1;
        }
    }
    return more;
}

/* Returns 0, or the number of the first line that does not parse. */
static unsigned parse_file(char *text, struct fleet *fleet) {
    unsigned number = 0;
    memset(fleet, 0, sizeof *fleet);
    strcpy(fleet->driver_version, "550.54.15");
    while (text != NULL) {
        char *line = strsep(&text, "\n");
        line += strspn(line, " \t\r");
        number++;
        if (*line == '\0' || *line == '#') continue;
        size_t word_bytes = strcspn(line, " \t\r");
        int bad = -1;
        if (word_bytes == 3 && memcmp(line, "gpu", 3) == 0) bad = parse_gpu(line + 3, fleet);
        if (word_bytes == 6 && memcmp(line, "driver", 6) == 0) bad = parse_driver(line + 6, fleet);
        if (bad != 0) return number;
    }
    return 0;
}

static int same_file(const struct stat *a, const struct stat *b) {
    return a->st_dev == b->st_dev && a->st_ino == b->st_ino && a->st_size == b->st_size &&
           a->st_mtim.tv_sec == b->st_mtim.tv_sec && a->st_mtim.tv_nsec == b->st_mtim.tv_nsec;
}

static void forget_file(void) {
    if (file_descriptor >= 0) close(file_descriptor);
    file_descriptor = -1;
    memset(&current, 0, sizeof current);
    current.driver_result = DRIVER_NOT_LOADED;
}

/* Reads the file if it is not the one that was read last. Called with the mutex held. */
static void refresh(void) {
    struct stat status;
    const char *path = getenv("BATON_FAKENVML_FILE");
    if (path == NULL || stat(path, &status) != 0) {
        forget_file();
        return;
    }
    if (file_descriptor >= 0 && same_file(&status, &file_status)) return;
    int opened = open(path, O_RDONLY | O_CLOEXEC);
    if (opened < 0 || fstat(opened, &status) != 0) {
        if (opened >= 0) close(opened);
        forget_file();
        return;
    }
    size_t length_bytes = 0;
    ssize_t got_bytes = 0;
    while (length_bytes < MAX_FILE_BYTES &&
           (got_bytes = read(opened, file_text + length_bytes, MAX_FILE_BYTES - length_bytes)) > 0)
        length_bytes += (size_t)got_bytes;
    file_text[length_bytes] = '\0';
    unsigned bad_line = parse_file(file_text, &parsed);
    if (got_bytes < 0 || length_bytes == MAX_FILE_BYTES)
        fprintf(stderr, "fakenvml: %s: not readable, or longer than %d bytes\n", path,
                (int)MAX_FILE_BYTES);
    else if (bad_line != 0)
        fprintf(stderr, "fakenvml: %s: line %u does not parse\n", path, bad_line);
    else current = parsed;
    if (file_descriptor < 0 && (bad_line != 0 || got_bytes < 0 || length_bytes == MAX_FILE_BYTES))
        current.driver_result = UNKNOWN;
    if (file_descriptor >= 0) close(file_descriptor);
    file_descriptor = opened;
    file_status = status;
}

/* ---- lookups ---- */

/* Lets others in for a moment. Called with the mutex held. */
static void look_again(void) {
    pthread_mutex_unlock(&mutex);
    usleep(LOOK_AGAIN_US);
    pthread_mutex_lock(&mutex);
    refresh();
}

/* Locks, and looks until the driver does not hang. */
static void lock_and_look(void) {
    pthread_mutex_lock(&mutex);
    refresh();
    while (current.driver_hangs)
        look_again();
}

/* Locks and looks; a result other than SUCCESS means that the call must return it. `leave` unlocks
 * either way. */
static int enter(void) {
    lock_and_look();
    return init_count == 0 ? UNINITIALIZED : SUCCESS;
}

static int leave(int result) {
    pthread_mutex_unlock(&mutex);
    return result;
}

static const struct gpu *listed(const char *uuid) {
    for (unsigned index = 0; index < current.gpu_count; index++)
        if (strcmp(current.gpus[index].uuid, uuid) == 0) return &current.gpus[index];
    return NULL;
}

static int handle_for(const struct gpu *gpu, void **device) {
    unsigned index = 0;
    while (index < handle_count && strcmp(handles[index].uuid, gpu->uuid) != 0)
        index++;
    if (index == MAX_HANDLES) return UNKNOWN;
    if (index == handle_count) {
        memcpy(handles[index].uuid, gpu->uuid, TEXT_BYTES);
        handle_count++;
    }
    *device = &handles[index];
    return gpu->state;
}

/* Copies the GPU's present state out, so that no caller holds the lock. */
static int read_gpu(const void *device, struct gpu *copy) {
    int result = enter();
    if (result != SUCCESS) return leave(result);
    const struct handle *handle = device;
    if (handle < handles || handle >= handles + handle_count) return leave(INVALID_ARGUMENT);
    const struct gpu *gpu = listed(handle->uuid);
    while (current.driver_hangs || (gpu != NULL && gpu->hangs)) {
        look_again();
        gpu = listed(handle->uuid);
    }
    if (gpu == NULL) return leave(GPU_IS_LOST);
    if (gpu->state == SUCCESS) *copy = *gpu;
    return leave(gpu->state);
}

static int read_field(const void *device, enum field field, uint64_t *value) {
    struct gpu gpu;
    int result = read_gpu(device, &gpu);
    if (result != SUCCESS) return result;
    *value = gpu.value[field];
    return gpu.result[field];
}

static int read_unsigned(const void *device, enum field field, unsigned *target) {
    uint64_t value;
    if (target == NULL) return INVALID_ARGUMENT;
    int result = read_field(device, field, &value);
    if (result == SUCCESS) *target = (unsigned)value;
    return result;
}

static int copy_text(const char *text, char *target, unsigned length_bytes) {
    if (target == NULL) return INVALID_ARGUMENT;
    if (strlen(text) >= length_bytes) return INSUFFICIENT_SIZE;
    strcpy(target, text);
    return SUCCESS;
}

/* ---- NVML ---- */

EXPORT int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    lock_and_look();
    if (current.driver_result == SUCCESS) init_count++;
    return leave(current.driver_result);
}

EXPORT int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }

EXPORT int nvmlShutdown(void) {
    pthread_mutex_lock(&mutex);
    if (init_count == 0) return leave(UNINITIALIZED);
    init_count--;
    return leave(SUCCESS);
}

EXPORT const char *nvmlErrorString(int result) {
    switch (result) {
    case SUCCESS: return "Success";
    case UNINITIALIZED: return "Uninitialized";
    case INVALID_ARGUMENT: return "Invalid Argument";
    case NOT_SUPPORTED: return "Not Supported";
    case NOT_FOUND: return "Not Found";
    case INSUFFICIENT_SIZE: return "Insufficient Size";
    case TIMEOUT: return "Timeout";
    case DRIVER_NOT_LOADED: return "Driver Not Loaded";
    case GPU_IS_LOST: return "GPU is lost";
    case RESET_REQUIRED: return "GPU requires reset";
    case LIB_RM_VERSION_MISMATCH: return "Driver/library version mismatch";
    case ARGUMENT_VERSION_MISMATCH: return "Argument Version Mismatch";
    default: return "Unknown Error";
    }
}

EXPORT int nvmlSystemGetDriverVersion(char *version, unsigned length_bytes) {
    int result = enter();
    if (result == SUCCESS) result = copy_text(current.driver_version, version, length_bytes);
    return leave(result);
}

EXPORT int nvmlDeviceGetCount_v2(unsigned *count) {
    int result = enter();
    if (result == SUCCESS && count == NULL) result = INVALID_ARGUMENT;
    if (result == SUCCESS) *count = current.gpu_count;
    return leave(result);
}

EXPORT int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
    int result = enter();
    if (result == SUCCESS && (device == NULL || index >= current.gpu_count))
        result = INVALID_ARGUMENT;
    if (result == SUCCESS) result = handle_for(&current.gpus[index], device);
    return leave(result);
}

EXPORT int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
    int result = enter();
    if (result == SUCCESS && (device == NULL || uuid == NULL)) result = INVALID_ARGUMENT;
    if (result != SUCCESS) return leave(result);
    const struct gpu *gpu = listed(uuid);
    return leave(gpu == NULL ? NOT_FOUND : handle_for(gpu, device));
}

EXPORT int nvmlDeviceGetUUID(void *device, char *uuid, unsigned length_bytes) {
    struct gpu gpu;
    int result = read_gpu(device, &gpu);
    return result == SUCCESS ? copy_text(gpu.uuid, uuid, length_bytes) : result;
}

EXPORT int nvmlDeviceGetName(void *device, char *name, unsigned length_bytes) {
    struct gpu gpu;
    int result = read_gpu(device, &gpu);
    return result == SUCCESS ? copy_text(gpu.name, name, length_bytes) : result;
}

struct memory_v1 {
    unsigned long long total_bytes, free_bytes, used_bytes;
};

/* Version 1 counts what the driver keeps for itself as used. */
EXPORT int nvmlDeviceGetMemoryInfo(void *device, struct memory_v1 *memory) {
    struct gpu gpu;
    if (memory == NULL) return INVALID_ARGUMENT;
    int result = read_gpu(device, &gpu);
    if (result != SUCCESS) return result;
    if (gpu.result[MEMORY] != SUCCESS) return gpu.result[MEMORY];
    memory->total_bytes = gpu.memory_bytes;
    memory->used_bytes = gpu.value[MEMORY] + gpu.memory_reserved_bytes;
    memory->free_bytes = memory->total_bytes - memory->used_bytes;
    return SUCCESS;
}

struct memory_v2 {
    unsigned version;
    unsigned long long total_bytes, reserved_bytes, free_bytes, used_bytes;
};

EXPORT int nvmlDeviceGetMemoryInfo_v2(void *device, struct memory_v2 *memory) {
    struct gpu gpu;
    if (memory == NULL) return INVALID_ARGUMENT;
    if (memory->version != (sizeof *memory | 2u << 24)) return ARGUMENT_VERSION_MISMATCH;
    int result = read_gpu(device, &gpu);
    if (result != SUCCESS) return result;
    if (gpu.result[MEMORY] != SUCCESS) return gpu.result[MEMORY];
    memory->total_bytes = gpu.memory_bytes;
    memory->reserved_bytes = gpu.memory_reserved_bytes;
    memory->used_bytes = gpu.value[MEMORY];
    memory->free_bytes = gpu.memory_bytes - gpu.memory_reserved_bytes - gpu.value[MEMORY];
    return SUCCESS;
}

struct utilization {
    unsigned gpu_percent, memory_percent;
};

EXPORT int nvmlDeviceGetUtilizationRates(void *device, struct utilization *utilization) {
    if (utilization == NULL) return INVALID_ARGUMENT;
    utilization->memory_percent = 0;
    return read_unsigned(device, UTILIZATION, &utilization->gpu_percent);
}

EXPORT int nvmlDeviceGetTemperature(void *device, unsigned sensor, unsigned *celsius) {
    if (sensor != 0) return INVALID_ARGUMENT;
    return read_unsigned(device, TEMPERATURE, celsius);
}

struct temperature_v1 {
    unsigned version, sensor;
    int celsius;
};

EXPORT int nvmlDeviceGetTemperatureV(void *device, struct temperature_v1 *temperature) {
    if (temperature == NULL || temperature->sensor != 0) return INVALID_ARGUMENT;
    if (temperature->version != (sizeof *temperature | 1u << 24)) return ARGUMENT_VERSION_MISMATCH;
    return read_unsigned(device, TEMPERATURE, (unsigned *)&temperature->celsius);
}

EXPORT int nvmlDeviceGetPowerUsage(void *device, unsigned *milliwatts) {
    return read_unsigned(device, POWER, milliwatts);
}

EXPORT int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *millijoules) {
    uint64_t value;
    if (millijoules == NULL) return INVALID_ARGUMENT;
    int result = read_field(device, ENERGY, &value);
    if (result == SUCCESS) *millijoules = value;
    return result;
}

/* NVML_CLOCK_GRAPHICS 0 and NVML_CLOCK_SM 1 run together here; NVML_CLOCK_MEM 2. */
EXPORT int nvmlDeviceGetClockInfo(void *device, unsigned type, unsigned *megahertz) {
    if (type > 2) return type == 3 ? NOT_SUPPORTED : INVALID_ARGUMENT;
    return read_unsigned(device, type == 2 ? MEMORY_CLOCK : SM_CLOCK, megahertz);
}

EXPORT int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count,
                                                   struct process *processes) {
    struct gpu gpu;
    if (count == NULL) return INVALID_ARGUMENT;
    int result = read_gpu(device, &gpu);
    if (result != SUCCESS) return result;
    unsigned room = *count;
    *count = gpu.process_count;
    if (room < gpu.process_count) return INSUFFICIENT_SIZE;
    if (gpu.process_count != 0 && processes == NULL) return INVALID_ARGUMENT;
    if (gpu.process_count != 0)
        memcpy(processes, gpu.processes, gpu.process_count * sizeof *processes);
    return SUCCESS;
}

struct pci { /* nvmlPciInfo_t */
    char bus_id_legacy[16];
    unsigned domain, bus, device, device_id, subsystem_id;
    char bus_id[32];
};

EXPORT int nvmlDeviceGetPciInfo_v3(void *device, struct pci *pci) {
    struct gpu gpu;
    if (pci == NULL) return INVALID_ARGUMENT;
    int result = read_gpu(device, &gpu);
    if (result != SUCCESS) return result;
    memset(pci, 0, sizeof *pci);
    pci->bus = (unsigned)gpu.pci_bus;
    snprintf(pci->bus_id, sizeof pci->bus_id, "00000000:%02X:00.0", pci->bus);
    return SUCCESS;
}

EXPORT int nvmlDeviceGetRemappedRows(void *device, unsigned *corrected, unsigned *uncorrected,
                                     unsigned *pending, unsigned *failed) {
    struct gpu gpu;
    int result = read_gpu(device, &gpu);
    if (result != SUCCESS) return result;
    *corrected = *uncorrected = 0;
    *pending = (unsigned)gpu.rows_pending;
    *failed = (unsigned)gpu.rows_failed;
    return gpu.rows_result;
}

struct field_value { /* nvmlFieldValue_t */
    unsigned field_id, scope_id;
    long long timestamp_us, latency_us;
    int value_type, result;
    unsigned long long value;
};

/* Each entry has its own return code. */
EXPORT int nvmlDeviceGetFieldValues(void *device, int count, struct field_value *values) {
    struct gpu gpu;
    if (count < 1 || values == NULL) return INVALID_ARGUMENT;
    int result = read_gpu(device, &gpu);
    if (result != SUCCESS) return result;
    for (int index = 0; index < count; index++) {
        struct field_value *value = &values[index];
        int known = value->field_id == RECOVERY_ACTION;
        value->result = known ? gpu.recovery_result : NOT_SUPPORTED;
        value->value_type = 1; /* NVML_VALUE_TYPE_UNSIGNED_INT */
        value->value = known ? gpu.recovery_action : 0;
    }
    return SUCCESS;
}

/* ---- events ---- */

struct event_set {
    uint64_t last_number;
    unsigned handle_count;
    const struct handle *handles[MAX_GPUS];
};

struct event { /* nvmlEventData_t */
    const void *device;
    unsigned long long type, data;
    unsigned gpu_instance_id, compute_instance_id;
};

EXPORT int nvmlEventSetCreate(struct event_set **created) {
    int result = enter();
    if (result != SUCCESS || created == NULL) return leave(result ? result : INVALID_ARGUMENT);
    struct event_set *set = calloc(1, sizeof *set);
    if (set == NULL) return leave(UNKNOWN);
    for (unsigned index = 0; index < current.gpu_count; index++)
        for (unsigned at = 0; at < current.gpus[index].xid_count; at++)
            if (current.gpus[index].xids[at].number > set->last_number)
                set->last_number = current.gpus[index].xids[at].number;
    *created = set;
    return leave(SUCCESS);
}

EXPORT int nvmlEventSetFree(struct event_set *set) {
    free(set);
    return SUCCESS;
}

EXPORT int nvmlDeviceRegisterEvents(void *device, unsigned long long types, struct event_set *set) {
    struct gpu gpu;
    int result = read_gpu(device, &gpu);
    if (result != SUCCESS) return result;
    if (types != XID_EVENT) return NOT_SUPPORTED;
    pthread_mutex_lock(&mutex);
    if (set->handle_count == MAX_GPUS) return leave(UNKNOWN);
    set->handles[set->handle_count++] = device;
    return leave(SUCCESS);
}

/* The oldest that the set has not given out yet. Called with the mutex held. */
static int next_event(struct event_set *set, struct event *event) {
    const struct xid *oldest = NULL;
    for (unsigned index = 0; index < set->handle_count; index++) {
        const struct gpu *gpu = listed(set->handles[index]->uuid);
        for (unsigned at = 0; gpu != NULL && at < gpu->xid_count; at++) {
            const struct xid *xid = &gpu->xids[at];
            if (xid->number <= set->last_number) continue;
            if (oldest != NULL && oldest->number <= xid->number) continue;
            oldest = xid;
            event->device = set->handles[index];
        }
    }
    if (oldest == NULL) return 0;
    set->last_number = oldest->number;
    event->type = XID_EVENT;
    event->data = oldest->code;
    event->gpu_instance_id = event->compute_instance_id = 0xFFFFFFFFu;
    return 1;
}

EXPORT int nvmlEventSetWait_v2(struct event_set *set, struct event *event, unsigned timeout_ms) {
    for (long left_us = (long)timeout_ms * 1000;; left_us -= LOOK_FOR_EVENTS_US) {
        pthread_mutex_lock(&mutex);
        refresh();
        if (next_event(set, event)) return leave(SUCCESS);
        pthread_mutex_unlock(&mutex);
        if (left_us <= 0) return TIMEOUT;
        usleep(LOOK_FOR_EVENTS_US);
    }
}
