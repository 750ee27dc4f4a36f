/* What drivers are asked every ten seconds or once a minute: the second half of nvml.c, which
 * includes it. Batched field values, buffers of samples, remapped rows, PCIe, NVLink, fabric, GPM,
 * MIG, PCI.
 *
 * Keys of `gpu`, all of which may be absent (NOT_SUPPORTED, by each entry's own return code where
 * calls are batched): ecc_enabled, ecc_{volatile,aggregate}_{corrected,uncorrected},
 * memory_temperature_celsius, pcie_replays, remapped_rows_{corrected,uncorrected,pending,failed},
 * pcie_{sent,received}_kb, pcie_generation, pcie_width and the _max of both, nvlinks_up,
 * nvlinks_down, fabric_state,
 * {sm,tensor}_activity_percent (GPM), clock_event_reasons, recovery_action, vbios_version, serial,
 * and {utilization_percent,memory_utilization_percent,power_mw}_samples=1,2,3: those are new
 * whenever the file is.
 */

static int read_text(int result, const char *text, char *target, unsigned length_bytes) {
    if (result != SUCCESS) return result;
    return text[0] == '\0' ? NOT_SUPPORTED : copy_text(text, target, length_bytes);
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
    if (gpu.parent[0] != '\0') return NOT_SUPPORTED;
    memset(pci, 0, sizeof *pci);
    pci->bus = (unsigned)gpu.pci_bus;
    snprintf(pci->bus_id, sizeof pci->bus_id, "00000000:%02X:00.0", pci->bus);
    return SUCCESS;
}

EXPORT int nvmlDeviceGetVbiosVersion(void *device, char *version, unsigned length_bytes) {
    struct gpu gpu;
    int result = read_gpu(device, &gpu);
    return read_text(result, gpu.vbios_version, version, length_bytes);
}

EXPORT int nvmlDeviceGetSerial(void *device, char *serial, unsigned length_bytes) {
    struct gpu gpu;
    int result = read_gpu(device, &gpu);
    return read_text(result, gpu.serial, serial, length_bytes);
}

EXPORT int nvmlDeviceGetCurrentClocksEventReasons(void *device, unsigned long long *reasons) {
    uint64_t value;
    if (reasons == NULL) return INVALID_ARGUMENT;
    int result = read_field(device, CLOCK_EVENT_REASONS, &value);
    if (result == SUCCESS) *reasons = value;
    return result;
}

EXPORT int nvmlDeviceGetCurrPcieLinkGeneration(void *device, unsigned *generation) {
    return read_unsigned(device, PCIE_GENERATION, generation);
}

EXPORT int nvmlDeviceGetMaxPcieLinkGeneration(void *device, unsigned *generation) {
    return read_unsigned(device, PCIE_GENERATION_MAX, generation);
}

EXPORT int nvmlDeviceGetCurrPcieLinkWidth(void *device, unsigned *width) {
    return read_unsigned(device, PCIE_WIDTH, width);
}

EXPORT int nvmlDeviceGetMaxPcieLinkWidth(void *device, unsigned *width) {
    return read_unsigned(device, PCIE_WIDTH_MAX, width);
}

/* counter: 0 is what it sends, 1 what it receives; in KB/s. The driver takes 20 ms for it. */
EXPORT int nvmlDeviceGetPcieThroughput(void *device, int counter, unsigned *value) {
    if (counter < 0 || counter > 1) return INVALID_ARGUMENT;
    return read_unsigned(device, counter == 0 ? PCIE_SENT : PCIE_RECEIVED, value);
}

EXPORT int nvmlDeviceGetRemappedRows(void *device, unsigned *corrected, unsigned *uncorrected,
                                     unsigned *pending, unsigned *failed) {
    struct gpu gpu;
    if (!corrected || !uncorrected || !pending || !failed) return INVALID_ARGUMENT;
    int result = read_gpu(device, &gpu);
    if (result == SUCCESS) result = gpu.result[REMAPPED_CORRECTED];
    if (result != SUCCESS) return result;
    *corrected = (unsigned)gpu.value[REMAPPED_CORRECTED];
    *uncorrected = (unsigned)gpu.value[REMAPPED_UNCORRECTED];
    *pending = (unsigned)gpu.value[REMAPPED_PENDING];
    *failed = (unsigned)gpu.value[REMAPPED_FAILED];
    return SUCCESS;
}

EXPORT int nvmlDeviceGetNvLinkState(void *device, unsigned link, unsigned *active) {
    struct gpu gpu;
    if (active == NULL) return INVALID_ARGUMENT;
    int result = read_gpu(device, &gpu);
    if (result == SUCCESS) result = gpu.result[NVLINKS_UP];
    if (result != SUCCESS) return result;
    if (link >= gpu.value[NVLINKS_UP] + gpu.value[NVLINKS_DOWN]) return INVALID_ARGUMENT;
    *active = link < gpu.value[NVLINKS_UP];
    return SUCCESS;
}

struct fabric_v2 {
    unsigned version;
    unsigned char cluster_uuid[16];
    int status;
    unsigned clique_id;
    unsigned char state;
    unsigned health_mask;
};

EXPORT int nvmlDeviceGetGpuFabricInfoV(void *device, struct fabric_v2 *fabric) {
    uint64_t state;
    if (fabric == NULL) return INVALID_ARGUMENT;
    if (fabric->version != (sizeof *fabric | 2u << 24)) return ARGUMENT_VERSION_MISMATCH;
    int result = read_field(device, FABRIC_STATE, &state);
    if (result == SUCCESS) fabric->state = (unsigned char)state;
    return result;
}

/* ---- batched field values ---- */

union value {
    double real;
    unsigned number;
    unsigned long long long_number;
};

struct field_value {
    unsigned field_id, scope_id;
    long long timestamp_us, latency_us;
    int value_type, result;
    union value value;
};

/* NVML_FI_DEV_*; -1: not one of ours. */
static int field_of(unsigned field_id) {
    switch (field_id) {
    case 1: return ECC_ENABLED;
    case 3: return ECC_VOLATILE_CORRECTED;
    case 4: return ECC_VOLATILE_UNCORRECTED;
    case 5: return ECC_AGGREGATE_CORRECTED;
    case 6: return ECC_AGGREGATE_UNCORRECTED;
    case 82: return MEMORY_TEMPERATURE;
    case 91: return NVLINKS_UP;
    case 94: return PCIE_REPLAYS;
    case 230: return RECOVERY_ACTION;
    default: return -1;
    }
}

EXPORT int nvmlDeviceGetFieldValues(void *device, int count, struct field_value *values) {
    struct gpu gpu;
    if (count < 1 || values == NULL) return INVALID_ARGUMENT;
    int result = read_gpu(device, &gpu);
    if (result != SUCCESS) return result;
    for (int place = 0; place < count; place++) {
        int field = field_of(values[place].field_id);
        values[place].result = field < 0 ? INVALID_ARGUMENT : gpu.result[field];
        values[place].value_type = 3; /* NVML_VALUE_TYPE_UNSIGNED_LONG_LONG */
        if (values[place].result != SUCCESS) continue;
        values[place].value.long_number = gpu.value[field];
        if (field == NVLINKS_UP) values[place].value.long_number += gpu.value[NVLINKS_DOWN];
    }
    return SUCCESS;
}

/* ---- buffers of samples ---- */

struct sample {
    unsigned long long timestamp_us;
    union value value;
};

/* NVML_TOTAL_POWER_SAMPLES 0, NVML_GPU_UTILIZATION_SAMPLES 1, NVML_MEMORY_UTILIZATION_SAMPLES 2,
 * in the order of `enum buffer`. Their times follow that of the file, a microsecond apart. */
EXPORT int nvmlDeviceGetSamples(void *device, unsigned buffer, unsigned long long seen_us,
                                int *value_type, unsigned *count, struct sample *samples) {
    struct gpu gpu;
    if (value_type == NULL || count == NULL) return INVALID_ARGUMENT;
    int result = read_gpu(device, &gpu);
    if (result != SUCCESS) return result;
    if (buffer >= BUFFER_COUNT || gpu.sample_count[buffer] == 0) return NOT_SUPPORTED;
    unsigned long long first_us = (unsigned long long)file_status.st_mtim.tv_sec * 1000000 +
                                  (unsigned long long)file_status.st_mtim.tv_nsec / 1000;
    unsigned given = 0, room = *count;
    *value_type = 1; /* NVML_VALUE_TYPE_UNSIGNED_INT */
    for (unsigned place = 0; place < gpu.sample_count[buffer]; place++) {
        if (first_us + place <= seen_us) continue;
        if (samples != NULL && given == room) return INSUFFICIENT_SIZE;
        if (samples != NULL) {
            samples[given].timestamp_us = first_us + place;
            samples[given].value.number = gpu.samples[buffer][place];
        }
        given++;
    }
    *count = given;
    return given == 0 ? NOT_FOUND : SUCCESS;
}

/* ---- GPM ---- */

struct gpm_support {
    unsigned version, is_supported;
};

EXPORT int nvmlGpmQueryDeviceSupport(void *device, struct gpm_support *support) {
    struct gpu gpu;
    if (support == NULL) return INVALID_ARGUMENT;
    int result = read_gpu(device, &gpu);
    if (result == SUCCESS) support->is_supported = gpu.result[SM_ACTIVITY] == SUCCESS;
    return result;
}

EXPORT int nvmlGpmSampleAlloc(struct gpu **sample) {
    if (sample == NULL) return INVALID_ARGUMENT;
    *sample = calloc(1, sizeof **sample);
    return *sample == NULL ? UNKNOWN : SUCCESS;
}

EXPORT int nvmlGpmSampleFree(struct gpu *sample) {
    free(sample);
    return SUCCESS;
}

EXPORT int nvmlGpmSampleGet(void *device, struct gpu *sample) {
    if (sample == NULL) return INVALID_ARGUMENT;
    int result = read_gpu(device, sample);
    return result == SUCCESS ? sample->result[SM_ACTIVITY] : result;
}

struct gpm_metric {
    unsigned metric_id;
    int result;
    double value;
    const char *names[3];
};

struct gpm_metrics {
    unsigned version, count;
    struct gpu *first, *second;
    struct gpm_metric metrics[]; /* the binding's last one depends on its version */
};

/* Of the later sample: nothing here runs long enough for an average. */
EXPORT int nvmlGpmMetricsGet(struct gpm_metrics *metrics) {
    if (metrics == NULL || !metrics->first || !metrics->second) return INVALID_ARGUMENT;
    for (unsigned place = 0; place < metrics->count; place++) {
        struct gpm_metric *metric = &metrics->metrics[place];
        int field = metric->metric_id == 2 ? SM_ACTIVITY : TENSOR_ACTIVITY;
        int is_ours = metric->metric_id == 2 || metric->metric_id == 5;
        metric->result = is_ours ? metrics->second->result[field] : NOT_SUPPORTED;
        metric->value = (double)metrics->second->value[field];
    }
    return SUCCESS;
}

/* ---- MIG ---- */

static const struct gpu *instance_at(const char *parent, unsigned index) {
    for (unsigned place = 0; place < current.gpu_count; place++)
        if (strcmp(current.gpus[place].parent, parent) == 0 && index-- == 0)
            return &current.gpus[place];
    return NULL;
}

EXPORT int nvmlDeviceGetMigMode(void *device, unsigned *now, unsigned *pending) {
    struct gpu gpu;
    if (now == NULL || pending == NULL) return INVALID_ARGUMENT;
    int result = read_gpu(device, &gpu);
    if (result == SUCCESS && gpu.parent[0] != '\0') result = NOT_SUPPORTED;
    if (result == SUCCESS && gpu.result[MIG_MODE] == UNKNOWN) result = UNKNOWN;
    if (result == SUCCESS) *now = *pending = (unsigned)gpu.mig;
    return result;
}

EXPORT int nvmlDeviceGetMaxMigDeviceCount(void *device, unsigned *count) {
    struct gpu gpu;
    if (count == NULL) return INVALID_ARGUMENT;
    int result = read_gpu(device, &gpu);
    if (result == SUCCESS) *count = gpu.mig ? 7 : 0;
    return result;
}

EXPORT int nvmlDeviceGetMigDeviceHandleByIndex(void *device, unsigned index, void **instance) {
    struct gpu gpu;
    if (instance == NULL) return INVALID_ARGUMENT;
    int result = read_gpu(device, &gpu);
    if (result != SUCCESS) return result;
    pthread_mutex_lock(&mutex);
    const struct gpu *found = instance_at(gpu.uuid, index);
    return leave(found == NULL ? NOT_FOUND : handle_for(found, instance));
}

/* Instances are numbered from 1, as the driver does; each has one compute instance. */
EXPORT int nvmlDeviceGetGpuInstanceId(void *instance, unsigned *id) {
    struct gpu gpu;
    if (id == NULL) return INVALID_ARGUMENT;
    int result = read_gpu(instance, &gpu);
    if (result != SUCCESS) return result;
    if (gpu.parent[0] == '\0') return INVALID_ARGUMENT;
    pthread_mutex_lock(&mutex);
    unsigned place = 0;
    const struct gpu *found;
    while ((found = instance_at(gpu.parent, place)) != NULL && strcmp(found->uuid, gpu.uuid) != 0)
        place++;
    *id = place + 1;
    return leave(found == NULL ? NOT_FOUND : SUCCESS);
}

EXPORT int nvmlDeviceGetComputeInstanceId(void *instance, unsigned *id) {
    struct gpu gpu;
    if (id == NULL) return INVALID_ARGUMENT;
    int result = read_gpu(instance, &gpu);
    if (result == SUCCESS && gpu.parent[0] == '\0') return INVALID_ARGUMENT;
    if (result == SUCCESS) *id = 0;
    return result;
}

EXPORT int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(void *instance, void **device) {
    struct gpu gpu;
    if (device == NULL) return INVALID_ARGUMENT;
    int result = read_gpu(instance, &gpu);
    if (result != SUCCESS) return result;
    if (gpu.parent[0] == '\0') return INVALID_ARGUMENT;
    pthread_mutex_lock(&mutex);
    const struct gpu *found = listed(gpu.parent);
    return leave(found == NULL ? NOT_FOUND : handle_for(found, device));
}
