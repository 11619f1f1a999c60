/* Python steps -> one immutable block of C memory, and the parameters of a run likewise.
 *
 * Everything is checked here, in the parent: register numbers, embedded NULs, that the last step is exec.
 * The child trusts what it walks. */
#include "convert.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Bytes collected first, then laid out: `texts` keeps the converted objects alive until they are copied. */
struct layout {
    PyObject *texts;
    size_t text_size;
};

static int layout_begin(struct layout *layout) {
    layout->text_size = 0;
    layout->texts = PyList_New(0);
    return layout->texts ? 0 : -1;
}

/* str or bytes without NUL, or None where `optional`; -1 with an exception set. */
static int layout_text(struct layout *layout, PyObject *value, int optional, const char *what) {
    PyObject *bytes = NULL;
    if (value == Py_None && optional) {
        bytes = Py_NewRef(Py_None);
    } else if (PyBytes_Check(value)) {
        bytes = Py_NewRef(value);
    } else if (PyUnicode_Check(value)) {
        bytes = PyUnicode_EncodeFSDefault(value);
    } else {
        PyErr_Format(PyExc_TypeError, "%s must be str or bytes%s, not %R", what, optional ? " or None" : "", value);
    }
    if (!bytes)
        return -1;
    int failed = PyList_Append(layout->texts, bytes);
    Py_DECREF(bytes);
    if (failed || bytes == Py_None)
        return failed;
    char *start;
    Py_ssize_t size;
    if (PyBytes_AsStringAndSize(bytes, &start, &size) < 0)
        return -1;
    if (memchr(start, 0, (size_t)size)) {
        PyErr_Format(PyExc_ValueError, "%s has a NUL byte: %R", what, value);
        return -1;
    }
    layout->text_size += (size_t)size + 1;
    return 0;
}

static int layout_data(struct layout *layout, PyObject *value) {
    if (value != Py_None && !PyBytes_Check(value)) {
        PyErr_Format(PyExc_TypeError, "data must be bytes or None, not %R", value);
        return -1;
    }
    if (PyList_Append(layout->texts, value) < 0)
        return -1;
    if (value != Py_None)
        layout->text_size += (size_t)PyBytes_Size(value) + 1;
    return 0;
}

/* Copy text number `index` to *at and move *at behind it; NULL for None. Every copy ends in a NUL. */
static const char *layout_copy(const struct layout *layout, Py_ssize_t index, char **at, uint32_t *len) {
    PyObject *bytes = PyList_GetItem(layout->texts, index);
    if (bytes == Py_None)
        return NULL;
    char *start, *copy = *at;
    Py_ssize_t size;
    if (PyBytes_AsStringAndSize(bytes, &start, &size) < 0)
        return NULL; /* not reached: layout_text made sure that these are bytes */
    memcpy(copy, start, (size_t)size);
    copy[size] = 0;
    *at += size + 1;
    if (len)
        *len = (uint32_t)size;
    return copy;
}

/* ---- plans ---- */

enum { STEP_FIELDS = 8, STEP_TEXTS = 4 };

static int register_valid(int number, unsigned registers, Py_ssize_t index) {
    if (number >= -1 && number < (int)registers)
        return 0;
    PyErr_Format(PyExc_ValueError, "step %zd uses register %d of %u", index, number, registers);
    return -1;
}

static int step_needs(uint32_t kind, int has_fd, int has_out, int has_source, int has_target, int has_data,
                      Py_ssize_t index) {
    static const struct {
        unsigned fd : 1, out : 1, source : 1, target : 1, data : 1;
    } needs[STEP_COUNT] = {
        [STEP_CGROUP_JOIN] = {.fd = 1},
        [STEP_MKDIR] = {.target = 1},
        [STEP_MKNOD_FILE] = {.target = 1},
        [STEP_CHOWN] = {.target = 1},
        [STEP_SYSCTL] = {.target = 1, .data = 1},
        [STEP_WRITE_FILE] = {.target = 1, .data = 1},
        [STEP_SYMLINK] = {.source = 1, .target = 1},
        [STEP_MOUNT] = {.target = 1},
        [STEP_OPEN_TREE] = {.source = 1, .out = 1},
        [STEP_OPEN_FILE] = {.source = 1, .out = 1},
        [STEP_FSMOUNT] = {.out = 1, .data = 1},
        [STEP_MOVE_MOUNT] = {.fd = 1, .target = 1},
        [STEP_MOUNT_SETATTR] = {.target = 1},
        [STEP_PIVOT_ROOT] = {.target = 1},
        [STEP_SETHOSTNAME] = {.data = 1},
        [STEP_SETDOMAINNAME] = {.data = 1},
        [STEP_LINK_UP] = {.target = 1},
        [STEP_DUP] = {.fd = 1},
        [STEP_CHDIR] = {.target = 1},
        [STEP_RLIMIT] = {.data = 1},
        [STEP_EXEC_LABEL] = {.fd = 1, .data = 1},
    };
    const char *missing = NULL;
    if (needs[kind].fd && !has_fd)
        missing = "fd";
    else if (needs[kind].out && !has_out)
        missing = "out";
    else if (needs[kind].source && !has_source)
        missing = "source";
    else if (needs[kind].target && !has_target)
        missing = "target";
    else if (needs[kind].data && !has_data)
        missing = "data";
    if (!missing)
        return 0;
    PyErr_Format(PyExc_ValueError, "step %zd (%s) lacks %s", index, step_names[kind], missing);
    return -1;
}

/* Values that the child would index or read with; the kernel judges everything else. */
static int step_check(const struct step *step, PyObject *item, unsigned registers, Py_ssize_t index) {
    if (register_valid(step->fd, registers, index) < 0 || register_valid(step->out, registers, index) < 0)
        return -1;
    PyObject *data = PyTuple_GetItem(item, 7);
    const Py_ssize_t data_len = data == Py_None ? -1 : PyBytes_Size(data);
    if (step_needs(step->kind, step->fd >= 0, step->out >= 0, PyTuple_GetItem(item, 4) != Py_None,
                   PyTuple_GetItem(item, 5) != Py_None, data_len >= 0, index) < 0)
        return -1;
    const char *wrong = NULL;
    if (step->kind == STEP_MARK && step->flags >= MARK_COUNT)
        wrong = "flags must be the number of a mark";
    if (step->kind == STEP_RLIMIT && data_len != 16)
        wrong = "data must be a struct rlimit64 (16 bytes)";
    if (step->kind == STEP_SETGROUPS && data_len > 0 && data_len % 4 != 0)
        wrong = "data must be an array of 32-bit group ids";
    if (step->kind == STEP_FSMOUNT && PyTuple_GetItem(item, 6) == Py_None)
        wrong = "lacks type";
    if (!wrong)
        return 0;
    PyErr_Format(PyExc_ValueError, "step %zd (%s): %s", index, step_names[step->kind], wrong);
    return -1;
}

/* fsmount data is walked pairwise to its end: an even number of NUL-terminated strings. */
static int fsmount_data_check(const struct step *step, PyObject *item, Py_ssize_t index) {
    if (step->kind != STEP_FSMOUNT)
        return 0;
    char *bytes;
    Py_ssize_t len, nuls = 0;
    if (PyBytes_AsStringAndSize(PyTuple_GetItem(item, 7), &bytes, &len) < 0)
        return -1;
    for (Py_ssize_t i = 0; i < len; i++)
        nuls += bytes[i] == 0;
    if (nuls % 2 == 0 && (len == 0 || bytes[len - 1] == 0))
        return 0;
    PyErr_Format(PyExc_ValueError, "step %zd (fsmount): data must be key\\0value\\0 pairs", index);
    return -1;
}

static int step_convert(struct step *step, PyObject *item, struct layout *layout, unsigned registers,
                        Py_ssize_t index) {
    unsigned kind;
    unsigned long long flags;
    PyObject *source, *target, *type, *data;
    if (!PyTuple_Check(item) || PyTuple_Size(item) != STEP_FIELDS) {
        PyErr_Format(PyExc_TypeError, "step %zd must be a tuple of %d fields", index, STEP_FIELDS);
        return -1;
    }
    if (!PyArg_ParseTuple(item, "IiiKOOOO", &kind, &step->fd, &step->out, &flags, &source, &target, &type, &data))
        return -1;
    if (kind >= STEP_COUNT) {
        PyErr_Format(PyExc_ValueError, "step %zd has no such kind: %u", index, kind);
        return -1;
    }
    step->kind = kind;
    step->flags = flags;
    if (layout_text(layout, source, 1, "source") < 0 || layout_text(layout, target, 1, "target") < 0 ||
        layout_text(layout, type, 1, "type") < 0 || layout_data(layout, data) < 0)
        return -1;
    if (step_check(step, item, registers, index) < 0)
        return -1;
    return fsmount_data_check(step, item, index);
}

/* exec ends a plan and only there: the child must not fall off its end. */
static int steps_check(const struct step *steps, Py_ssize_t count) {
    for (Py_ssize_t i = 0; i < count; i++) {
        if ((steps[i].kind == STEP_EXEC) == (i == count - 1))
            continue;
        PyErr_SetString(PyExc_ValueError, "a plan ends in one exec step");
        return -1;
    }
    return 0;
}

static struct plan *plan_layout(const struct layout *layout, const struct step *steps, Py_ssize_t count) {
    struct plan *plan = malloc(sizeof(*plan) + (size_t)count * sizeof(*steps) + layout->text_size);
    if (!plan) {
        PyErr_NoMemory();
        return NULL;
    }
    struct step *copies = (struct step *)(plan + 1);
    char *at = (char *)(copies + count);
    memcpy(copies, steps, (size_t)count * sizeof(*steps));
    for (Py_ssize_t i = 0; i < count; i++) {
        copies[i].source = layout_copy(layout, i * STEP_TEXTS, &at, NULL);
        copies[i].target = layout_copy(layout, i * STEP_TEXTS + 1, &at, NULL);
        copies[i].type = layout_copy(layout, i * STEP_TEXTS + 2, &at, NULL);
        copies[i].data = layout_copy(layout, i * STEP_TEXTS + 3, &at, &copies[i].data_len);
    }
    plan->steps = copies;
    plan->step_count = (uint32_t)count;
    return plan;
}

static struct plan *steps_convert(PyObject *sequence, Py_ssize_t count, struct step *steps, unsigned registers) {
    struct layout layout;
    struct plan *plan = NULL;
    if (layout_begin(&layout) < 0)
        return NULL;
    Py_ssize_t i = 0;
    for (; i < count; i++) {
        PyObject *item = PyTuple_GetItem(sequence, i);
        if (!item || step_convert(&steps[i], item, &layout, registers, i) < 0)
            break;
    }
    if (i == count && steps_check(steps, count) == 0)
        plan = plan_layout(&layout, steps, count);
    Py_DECREF(layout.texts);
    return plan;
}

struct plan *plan_convert(PyObject *sequence, unsigned long long clone_flags, unsigned registers,
                          unsigned spawner_steps) {
    PyObject *items = PySequence_Tuple(sequence);
    if (!items)
        return NULL;
    const Py_ssize_t count = PyTuple_Size(items);
    struct plan *plan = NULL;
    struct step *steps = count ? calloc((size_t)count, sizeof(*steps)) : NULL;
    if (count && spawner_steps >= (size_t)count)
        PyErr_Format(PyExc_ValueError, "%u of %zd steps for the spawner leave none for the child", spawner_steps,
                     count);
    else if (steps)
        plan = steps_convert(items, count, steps, registers);
    else if (count)
        PyErr_NoMemory();
    else
        PyErr_SetString(PyExc_ValueError, "a plan ends in one exec step");
    free(steps);
    Py_DECREF(items);
    if (plan) {
        plan->clone_flags = clone_flags;
        plan->register_count = registers;
        plan->spawner_steps = spawner_steps;
    }
    return plan;
}

void plan_free(struct plan *plan) {
    free(plan);
}

/* ---- runs ---- */

static Py_ssize_t layout_list(struct layout *layout, PyObject *sequence, const char *what) {
    PyObject *items = PySequence_Tuple(sequence);
    if (!items)
        return -1;
    const Py_ssize_t count = PyTuple_Size(items);
    Py_ssize_t i = 0;
    while (i < count && layout_text(layout, PyTuple_GetItem(items, i), 0, what) == 0)
        i++;
    Py_DECREF(items);
    return i == count ? count : -1;
}

static const char **layout_array(const struct layout *layout, Py_ssize_t first, Py_ssize_t count, const char ***slots,
                                 char **at) {
    const char **array = *slots;
    for (Py_ssize_t i = 0; i < count; i++)
        array[i] = layout_copy(layout, first + i, at, NULL);
    array[count] = NULL;
    *slots += count + 1;
    return array;
}

static int registers_fill(struct run *run, const struct plan *plan, PyObject *descriptors) {
    PyObject *items = PySequence_Tuple(descriptors);
    if (!items)
        return -1;
    const Py_ssize_t count = PyTuple_Size(items);
    int failed = 0;
    if (count > (Py_ssize_t)plan->register_count) {
        PyErr_Format(PyExc_ValueError, "%zd descriptors for %u registers", count, plan->register_count);
        failed = -1;
    }
    for (uint32_t i = 0; !failed && i < plan->register_count; i++) {
        long fd = (Py_ssize_t)i < count ? PyLong_AsLong(PyTuple_GetItem(items, i)) : -1;
        run->registers[i] = (int)fd;
        failed = fd == -1 && PyErr_Occurred() ? -1 : 0;
    }
    Py_DECREF(items);
    return failed;
}

static struct run *run_layout(const struct layout *layout, const struct plan *plan, const Py_ssize_t counts[3]) {
    const size_t slots = (size_t)(counts[0] + counts[1] + counts[2] + 3);
    struct run *run =
        calloc(1, sizeof(*run) + slots * sizeof(char *) + plan->register_count * sizeof(int) + layout->text_size);
    if (!run) {
        PyErr_NoMemory();
        return NULL;
    }
    const char **at_slots = (const char **)(run + 1);
    run->registers = (int *)(at_slots + slots);
    char *at = (char *)(run->registers + plan->register_count);
    run->argv = (char *const *)layout_array(layout, 0, counts[0], &at_slots, &at);
    run->envp = (char *const *)layout_array(layout, counts[0], counts[1], &at_slots, &at);
    run->paths = (const char *const *)layout_array(layout, counts[0] + counts[1], counts[2], &at_slots, &at);
    const Py_ssize_t rest = counts[0] + counts[1] + counts[2];
    run->id_map = layout_copy(layout, rest, &at, NULL);
    if (run->id_map && sscanf(run->id_map, "%*u %u", &run->id_first) != 1)
        run->id_first = 0; /* the kernel will refuse such a map in its own words */
    run->oom_score_adj = layout_copy(layout, rest + 1, &at, NULL);
    run->plan = plan;
    run->cgroup_fd = -1;
    run->pidfd = -1;
    return run;
}

struct run *run_convert(const struct plan *plan, PyObject *descriptors, PyObject *argv, PyObject *envp, PyObject *paths,
                        PyObject *id_map, PyObject *oom_score_adj) {
    struct layout layout;
    struct run *run = NULL;
    if (layout_begin(&layout) < 0)
        return NULL;
    Py_ssize_t counts[3] = {-1, -1, -1};
    counts[0] = layout_list(&layout, argv, "argv");
    if (counts[0] >= 0)
        counts[1] = layout_list(&layout, envp, "environment");
    if (counts[1] >= 0)
        counts[2] = layout_list(&layout, paths, "path");
    if (counts[2] >= 0 && layout_text(&layout, id_map, 1, "id map") == 0 &&
        layout_text(&layout, oom_score_adj, 1, "oom_score_adj") == 0)
        run = run_layout(&layout, plan, counts);
    Py_DECREF(layout.texts);
    if (run && registers_fill(run, plan, descriptors) < 0) {
        free(run);
        run = NULL;
    }
    return run;
}
