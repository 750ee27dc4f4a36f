/* The errors (XIDs) of GPUs, for whoever waits for them; nvml.c includes it.
 *
 * `xids=1:95,2:79` of a GPU are its errors, each with a number that grows over all GPUs: who waits
 * for events gets those with a higher one than any that was there when he began to wait. A MIG
 * instance has none; its GPU has.
 */

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
