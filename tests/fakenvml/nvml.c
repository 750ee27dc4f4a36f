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
 * memory temperature power energy sm_clock memory_clock, and as the keys that detail.h lists; that
 * file has what drivers are asked less often, and events.h their errors. `pci_bus=59` is the number
 * of its bus. `driver` has state=ok|not_loaded|mismatch|hangs.
 *
 * mig=1 is a GPU in MIG mode, which does not know its utilization; parent=GPU-... makes an instance
 * of that GPU, which has no index and no bus of its own.
 *
 * Every call writes its name, a line, into the file that BATON_FAKENVML_CALLS names, if any: what a
 * binding counts is its own calls, and some of its functions call the driver twice.
 *
 * What hangs blocks its callers, and nobody else, until the file says otherwise: a GPU in every
 * call about it, the driver in every call. Who is blocked says so in the file that
 * BATON_FAKENVML_HANGS names, if any: its process, and by which file it is (inode, mtime).
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
#include <libgen.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

enum {
    MAX_GPUS = 64,      /* four times the largest box there is (16 GPUs) */
    MAX_HANDLES = 256,  /* UUIDs ever seen by one process: four complete changes of the fleet */
    MAX_PROCESSES = 32, /* per GPU; more than any share is cut into */
    MAX_SAMPLES = 128, /* per buffer; drivers keep about as many */
    LOOK_AGAIN_US = 1000, /* how soon a call that hangs sees that it need not */
    MAX_FILE_BYTES = 1 << 18, /* MAX_GPUS lines of 4 KiB */
    MAX_XIDS = 64,   /* per GPU in one file; a storm is written in pieces */
    LOOK_FOR_EVENTS_MS = 10, /* how late an event may be where the file cannot be watched */
    XID_EVENT = 8,   /* nvmlEventTypeXidCriticalError */
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

/* Those after MEMORY_CLOCK are read in detail.h. NVLINKS_DOWN counts on from NVLINKS_UP. */
enum field {
    UTILIZATION, MEMORY, TEMPERATURE, POWER, ENERGY, SM_CLOCK, MEMORY_CLOCK,
    ECC_ENABLED, ECC_VOLATILE_CORRECTED, ECC_VOLATILE_UNCORRECTED, ECC_AGGREGATE_CORRECTED,
    ECC_AGGREGATE_UNCORRECTED, MEMORY_TEMPERATURE, PCIE_REPLAYS, REMAPPED_CORRECTED,
    REMAPPED_UNCORRECTED, REMAPPED_PENDING, REMAPPED_FAILED, PCIE_GENERATION, PCIE_GENERATION_MAX,
    PCIE_WIDTH, PCIE_WIDTH_MAX, NVLINKS_UP, NVLINKS_DOWN, FABRIC_STATE, SM_ACTIVITY,
    TENSOR_ACTIVITY, CLOCK_EVENT_REASONS, RECOVERY_ACTION, PCIE_SENT, PCIE_RECEIVED, MIG_MODE,
    FIELD_COUNT
};
static const char *const field_names[FIELD_COUNT] = {
    "utilization", "memory", "temperature", "power", "energy", "sm_clock", "memory_clock",
    "ecc_enabled", "ecc_volatile_corrected", "ecc_volatile_uncorrected", "ecc_aggregate_corrected",
    "ecc_aggregate_uncorrected", "memory_temperature_celsius", "pcie_replays",
    "remapped_rows_corrected", "remapped_rows_uncorrected", "remapped_rows_pending",
    "remapped_rows_failed", "pcie_generation", "pcie_generation_max", "pcie_width",
    "pcie_width_max", "nvlinks_up", "nvlinks_down", "fabric_state", "sm_activity_percent",
    "tensor_activity_percent", "clock_event_reasons", "recovery_action",
    "pcie_sent_kb", "pcie_received_kb", "mig_mode"};
static const char *const field_keys[FIELD_COUNT] = {
    "utilization_percent", "memory_used_bytes", "temperature_celsius", "power_mw",
    "energy_mj",           "sm_clock_mhz",      "memory_clock_mhz"};
enum buffer { POWER_SAMPLES, UTILIZATION_SAMPLES, MEMORY_UTILIZATION_SAMPLES, BUFFER_COUNT };
static const char *const buffer_keys[BUFFER_COUNT] = {
    "power_mw_samples", "utilization_percent_samples", "memory_utilization_percent_samples"};

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
    char parent[TEXT_BYTES]; /* of a MIG instance */
    int mig;                 /* it is in MIG mode */
    char vbios_version[TEXT_BYTES];
    char serial[TEXT_BYTES];
    unsigned sample_count[BUFFER_COUNT];
    unsigned samples[BUFFER_COUNT][MAX_SAMPLES];
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
static int calls_descriptor = -1;
static struct stat file_status;
static struct stat hang_status; /* of the file by which a call was blocked last */
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
        if (names[field] != NULL && strcmp(names[field], text) == 0) return field;
    return -1;
}

static int field_by_key(const char *text) {
    int field = field_by(field_keys, text);
    if (field >= 0) return field;
    field = field_by(field_names, text);
    return field > MEMORY_CLOCK ? field : -1;
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

static int parse_samples(char *text, struct gpu *gpu, enum buffer buffer) {
    char *rest = NULL;
    for (char *item = strtok_r(text, ",", &rest); item; item = strtok_r(NULL, ",", &rest)) {
        uint64_t value;
        if (gpu->sample_count[buffer] == MAX_SAMPLES || parse_number(item, &value) != 0) return -1;
        gpu->samples[buffer][gpu->sample_count[buffer]++] = (unsigned)value;
    }
    return 0;
}

static int parse_gpu_pair(const char *key, char *value, struct gpu *gpu,
                          int explicit_result[FIELD_COUNT]) {
    for (int buffer = 0; buffer < BUFFER_COUNT; buffer++)
        if (strcmp(buffer_keys[buffer], key) == 0) return parse_samples(value, gpu, buffer);
    int field = field_by_key(key);
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
    if (strcmp(key, "pci_bus") == 0) return parse_number(value, &gpu->pci_bus);
    if (strcmp(key, "parent") == 0) return parse_text(value, gpu->parent);
    if (strcmp(key, "vbios_version") == 0) return parse_text(value, gpu->vbios_version);
    if (strcmp(key, "serial") == 0) return parse_text(value, gpu->serial);
    if (strcmp(key, "mig") == 0) return (gpu->mig = strcmp(value, "1") == 0) ? 0 : -1;
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
    if (gpu->mig) gpu->result[UTILIZATION] = NOT_SUPPORTED;
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

/* Writes the name of a call down. Called with the mutex held, by whoever was called. */
static void note(const char *call) {
    char line[64];
    const char *path = getenv("BATON_FAKENVML_CALLS");
    if (path == NULL) return;
    if (calls_descriptor < 0) calls_descriptor = open(path, O_WRONLY | O_APPEND | O_CLOEXEC);
    int length_bytes = snprintf(line, sizeof line, "%s\n", call);
    if (calls_descriptor >= 0 && write(calls_descriptor, line, (size_t)length_bytes) < 0)
        fprintf(stderr, "fakenvml: %s cannot be written to\n", path);
}

/* Says once that a call is blocked, by the file as it was last read. */
static void note_hang(void) {
    char line[128];
    const char *path = getenv("BATON_FAKENVML_HANGS");
    if (path == NULL || same_file(&hang_status, &file_status)) return;
    int length_bytes = snprintf(line, sizeof line, "%d %llu %lld", (int)getpid(),
                                (unsigned long long)file_status.st_ino,
                                (long long)file_status.st_mtim.tv_sec * 1000000000LL +
                                    file_status.st_mtim.tv_nsec);
    int descriptor = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (descriptor < 0 || write(descriptor, line, (size_t)length_bytes) < 0)
        fprintf(stderr, "fakenvml: %s cannot be written to\n", path);
    if (descriptor >= 0) close(descriptor);
    hang_status = file_status;
}

/* Lets others in for a moment. Called with the mutex held. */
static void look_again(void) {
    note_hang();
    pthread_mutex_unlock(&mutex);
    usleep(LOOK_AGAIN_US);
    pthread_mutex_lock(&mutex);
    refresh();
}

/* Locks, and looks until the driver does not hang. */
static void lock_and_look(const char *call) {
    pthread_mutex_lock(&mutex);
    note(call);
    refresh();
    while (current.driver_hangs)
        look_again();
}

/* Locks and looks; a result other than SUCCESS means that the call must return it. `leave` unlocks
 * either way. */
static int enter_for(const char *call) {
    lock_and_look(call);
    return init_count == 0 ? UNINITIALIZED : SUCCESS;
}

#define enter() enter_for(__func__)

static int leave(int result) {
    pthread_mutex_unlock(&mutex);
    return result;
}

static const struct gpu *listed(const char *uuid) {
    for (unsigned index = 0; index < current.gpu_count; index++)
        if (strcmp(current.gpus[index].uuid, uuid) == 0) return &current.gpus[index];
    return NULL;
}

/* Only whole GPUs have an index; NULL beyond the last. */
static const struct gpu *whole_at(unsigned index) {
    for (unsigned place = 0; place < current.gpu_count; place++)
        if (current.gpus[place].parent[0] == '\0' && index-- == 0) return &current.gpus[place];
    return NULL;
}

static unsigned whole_count(void) {
    unsigned count = 0;
    while (whole_at(count) != NULL)
        count++;
    return count;
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
static int read_gpu_for(const char *call, const void *device, struct gpu *copy) {
    int result = enter_for(call);
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

#define read_gpu(device, copy) read_gpu_for(__func__, device, copy)

static int read_field_for(const char *call, const void *device, enum field field,
                          uint64_t *value) {
    struct gpu gpu;
    int result = read_gpu_for(call, device, &gpu);
    if (result != SUCCESS) return result;
    *value = gpu.value[field];
    return gpu.result[field];
}

#define read_field(device, field, value) read_field_for(__func__, device, field, value)

static int read_unsigned_for(const char *call, const void *device, enum field field,
                             unsigned *target) {
    uint64_t value;
    if (target == NULL) return INVALID_ARGUMENT;
    int result = read_field_for(call, device, field, &value);
    if (result == SUCCESS) *target = (unsigned)value;
    return result;
}

#define read_unsigned(device, field, target) read_unsigned_for(__func__, device, field, target)

static int copy_text(const char *text, char *target, unsigned length_bytes) {
    if (target == NULL) return INVALID_ARGUMENT;
    if (strlen(text) >= length_bytes) return INSUFFICIENT_SIZE;
    strcpy(target, text);
    return SUCCESS;
}

/* ---- NVML ---- */

EXPORT int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    lock_and_look(__func__);
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
    if (result == SUCCESS) *count = whole_count();
    return leave(result);
}

EXPORT int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
    int result = enter();
    const struct gpu *gpu = result == SUCCESS ? whole_at(index) : NULL;
    if (result == SUCCESS && (device == NULL || gpu == NULL)) result = INVALID_ARGUMENT;
    if (result == SUCCESS) result = handle_for(gpu, device);
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

#include "detail.h"
#include "events.h"
