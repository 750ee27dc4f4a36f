/* The errors (XIDs) of GPUs, for whoever waits for them; nvml.c includes it.
 *
 * `xids=1:95,2:79` of a GPU are its errors, each with a number that grows over all GPUs: who waits
 * for events gets those with a higher one than any that was there when he began to wait. A MIG
 * instance has none; its GPU has.
 */

struct event_set {
    uint64_t last_number;
    int changes_descriptor; /* inotify's; below zero where there is none */
    unsigned handle_count;
    const struct handle *handles[MAX_GPUS];
};

struct event { /* nvmlEventData_t */
    const void *device;
    unsigned long long type, data;
    unsigned gpu_instance_id, compute_instance_id;
};

/* Of whatever is put in place of the description. */
static int watch_changes(void) {
    char directory[PATH_MAX];
    const char *path = getenv("BATON_FAKENVML_FILE");
    const int descriptor = inotify_init1(IN_CLOEXEC | IN_NONBLOCK);
    if (path == NULL || strlen(path) >= sizeof directory || descriptor < 0) return descriptor;
    strcpy(directory, path);
    if (inotify_add_watch(descriptor, dirname(directory), IN_MOVED_TO | IN_CLOSE_WRITE) >= 0)
        return descriptor;
    close(descriptor);
    return -1;
}

static uint64_t monotonic_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

EXPORT int nvmlEventSetCreate(struct event_set **created) {
    int result = enter();
    if (result != SUCCESS || created == NULL) return leave(result ? result : INVALID_ARGUMENT);
    struct event_set *set = calloc(1, sizeof *set);
    if (set == NULL) return leave(UNKNOWN);
    set->changes_descriptor = watch_changes();
    for (unsigned index = 0; index < current.gpu_count; index++)
        for (unsigned at = 0; at < current.gpus[index].xid_count; at++)
            if (current.gpus[index].xids[at].number > set->last_number)
                set->last_number = current.gpus[index].xids[at].number;
    *created = set;
    return leave(SUCCESS);
}

EXPORT int nvmlEventSetFree(struct event_set *set) {
    if (set->changes_descriptor >= 0) close(set->changes_descriptor);
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

/* Until the directory of the description changes, or for `wait_ms`: a driver blocks where nothing
 * happens, and a stand-in that looked a hundred times a second was four fifths of what a sampler
 * seemed to cost. */
static void await_change(struct event_set *set, int wait_ms) {
    char changes[4096];
    struct pollfd waiting = {.fd = set->changes_descriptor, .events = POLLIN};
    if (set->changes_descriptor < 0 && wait_ms > LOOK_FOR_EVENTS_MS) wait_ms = LOOK_FOR_EVENTS_MS;
    if (poll(&waiting, 1, wait_ms) > 0)
        while (read(set->changes_descriptor, changes, sizeof changes) > 0) continue;
}

EXPORT int nvmlEventSetWait_v2(struct event_set *set, struct event *event, unsigned timeout_ms) {
    const uint64_t end_ms = monotonic_ms() + timeout_ms;
    for (;;) {
        pthread_mutex_lock(&mutex);
        refresh();
        if (next_event(set, event)) return leave(SUCCESS);
        pthread_mutex_unlock(&mutex);
        const uint64_t now_ms = monotonic_ms();
        if (now_ms >= end_ms) return TIMEOUT;
        await_change(set, (int)(end_ms - now_ms));
    }
}
