/* diyc._core: the method tables, the types and the GIL; the only file that raises for the kernel's errors. */
#include "convert.h"
#include "spawner.h"

#include <errno.h>
#include <stdlib.h>

static PyObject *raise_errno(int error, const char *what, PyObject *path) {
    errno = -error;
    PyObject *message = path ? PyUnicode_FromFormat("%s %S", what, path) : PyUnicode_FromString(what);
    if (!message)
        return NULL;
    PyObject *exception = PyObject_CallFunction(PyExc_OSError, "iO", -error, message);
    Py_DECREF(message);
    if (!exception)
        return NULL;
    PyErr_SetObject((PyObject *)Py_TYPE(exception), exception);
    Py_DECREF(exception);
    return NULL;
}

/* ---- Plan ---- */

typedef struct {
    PyObject_HEAD
    struct plan *plan;
} PlanObject;

static PyObject *Plan_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"steps", "clone_flags", "registers", "spawner_steps", NULL};
    PyObject *steps;
    unsigned long long clone_flags;
    unsigned registers, spawner_steps = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OKI|I:Plan", names, &steps, &clone_flags, &registers,
                                     &spawner_steps))
        return NULL;
    struct plan *plan = plan_convert(steps, clone_flags, registers, spawner_steps);
    if (!plan)
        return NULL;
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    PlanObject *self = (PlanObject *)alloc(type, 0);
    if (!self) {
        plan_free(plan);
        return NULL;
    }
    self->plan = plan;
    return (PyObject *)self;
}

static void Plan_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    plan_free(((PlanObject *)self)->plan);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static PyType_Slot plan_slots[] = {
    {Py_tp_new, Plan_new},
    {Py_tp_dealloc, Plan_dealloc},
    {Py_tp_doc,
     "Plan(steps, clone_flags, registers, spawner_steps=0): steps in C memory, walked by any number of runs."},
    {0, NULL},
};

static PyType_Spec plan_spec = {"diyc._core.Plan", sizeof(PlanObject), 0, Py_TPFLAGS_DEFAULT, plan_slots};

/* ---- Spawner ---- */

typedef struct {
    PyObject_HEAD
    struct spawner *spawner;
    PyTypeObject *plan_type;
} SpawnerObject;

static void run_release(struct run *run) {
    Py_XDECREF((PyObject *)run->plan_owner);
    free(run);
}

static void runs_release(struct run *run) {
    while (run) {
        struct run *next = run->next;
        run_release(run);
        run = next;
    }
}

static int spawner_open(SpawnerObject *self) {
    if (self->spawner)
        return 0;
    PyErr_SetString(PyExc_ValueError, "the spawner is closed");
    return -1;
}

static PyObject *Spawner_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"threads", "scratch", NULL};
    unsigned threads;
    PyObject *scratch;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "IO&:Spawner", names, &threads, PyUnicode_FSConverter, &scratch))
        return NULL;
    if (threads < 1 || threads > 64) {
        Py_DECREF(scratch);
        return PyErr_Format(PyExc_ValueError, "threads must be 1 to 64, not %u", threads);
    }
    const char *what = "allocate", *path = PyBytes_AsString(scratch);
    struct spawner *spawner = NULL;
    int error;
    Py_BEGIN_ALLOW_THREADS error = spawner_new(&spawner, threads, path, &what);
    Py_END_ALLOW_THREADS Py_DECREF(scratch);
    if (error < 0)
        return raise_errno(error, what, NULL);
    PyObject *module = PyType_GetModule(type);
    PyObject *plan_type = module ? PyObject_GetAttrString(module, "Plan") : NULL;
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    SpawnerObject *self = plan_type ? (SpawnerObject *)alloc(type, 0) : NULL;
    if (!self) {
        struct run *left;
        spawner_free(spawner, &left);
        Py_XDECREF(plan_type);
        return NULL;
    }
    self->spawner = spawner;
    self->plan_type = (PyTypeObject *)plan_type;
    return (PyObject *)self;
}

static PyObject *Spawner_close(PyObject *object, PyObject *unused) {
    (void)unused;
    SpawnerObject *self = (SpawnerObject *)object;
    struct spawner *spawner = self->spawner;
    struct run *left = NULL;
    self->spawner = NULL;
    if (spawner) {
        Py_BEGIN_ALLOW_THREADS spawner_free(spawner, &left);
        Py_END_ALLOW_THREADS
    }
    runs_release(left);
    Py_RETURN_NONE;
}

static void Spawner_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject *none = Spawner_close(self, NULL);
    Py_XDECREF(none);
    Py_XDECREF((PyObject *)((SpawnerObject *)self)->plan_type);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static PyObject *Spawner_submit(PyObject *object, PyObject *args) {
    SpawnerObject *self = (SpawnerObject *)object;
    unsigned long long token;
    int cgroup_fd;
    PyObject *plan, *descriptors, *argv, *envp, *paths, *id_map, *oom_score_adj;
    if (!PyArg_ParseTuple(args, "O!KOOOOOOi:submit", self->plan_type, &plan, &token, &descriptors, &argv, &envp, &paths,
                          &id_map, &oom_score_adj, &cgroup_fd) ||
        spawner_open(self) < 0)
        return NULL;
    struct run *run = run_convert(((PlanObject *)plan)->plan, descriptors, argv, envp, paths, id_map, oom_score_adj);
    if (!run)
        return NULL;
    run->token = token;
    run->cgroup_fd = cgroup_fd;
    run->plan_owner = Py_NewRef(plan);
    spawner_submit(self->spawner, run);
    Py_RETURN_NONE;
}

/* (token, pid, pidfd, failed, errno, index, dequeued_ns, started_ns, marks) */
static PyObject *run_report(const struct run *run) {
    PyObject *marks = PyTuple_New(MARK_COUNT);
    for (int i = 0; marks && i < MARK_COUNT; i++)
        PyTuple_SetItem(marks, i, PyLong_FromUnsignedLongLong(run->progress.marks[i]));
    if (!marks)
        return NULL;
    const int index = (int)run->progress.index; /* UINT32_MAX, clone3 itself, becomes -1 */
    return Py_BuildValue("KiiOiiKKN", (unsigned long long)run->token, run->pid, run->pidfd,
                         run->failed ? Py_True : Py_False, run->error, index, (unsigned long long)run->dequeued_ns,
                         (unsigned long long)run->started_ns, marks);
}

static PyObject *Spawner_completions(PyObject *object, PyObject *unused) {
    (void)unused;
    SpawnerObject *self = (SpawnerObject *)object;
    if (spawner_open(self) < 0)
        return NULL;
    PyObject *list = PyList_New(0);
    struct run *run = list ? spawner_drain(self->spawner) : NULL;
    while (run) {
        struct run *next = run->next;
        PyObject *report = list ? run_report(run) : NULL;
        if (!report || PyList_Append(list, report) < 0)
            Py_CLEAR(list);
        Py_XDECREF(report);
        run_release(run);
        run = next;
    }
    return list;
}

static PyObject *Spawner_kill(PyObject *object, PyObject *argument) {
    SpawnerObject *self = (SpawnerObject *)object;
    unsigned long long token = PyLong_AsUnsignedLongLong(argument);
    if (PyErr_Occurred() || spawner_open(self) < 0)
        return NULL;
    return PyBool_FromLong(spawner_kill(self->spawner, token));
}

static PyObject *Spawner_fileno(PyObject *object, PyObject *unused) {
    (void)unused;
    SpawnerObject *self = (SpawnerObject *)object;
    return spawner_open(self) < 0 ? NULL : PyLong_FromLong(spawner_eventfd(self->spawner));
}

static PyMethodDef spawner_methods[] = {
    {"submit", Spawner_submit, METH_VARARGS,
     "submit(plan, token, descriptors, argv, envp, paths, id_map, oom_score_adj, cgroup_fd): queue a run and return."},
    {"completions", Spawner_completions, METH_NOARGS,
     "Runs started or failed since the last call: a list of (token, pid, pidfd, failed, errno, step index,\n"
     "dequeued_ns, started_ns, marks). Index -1 is clone3 itself; errno 0 of a failed one means that it was killed."},
    {"kill", Spawner_kill, METH_O, "kill(token): SIGKILL a run that is still being set up; whether there was one."},
    {"fileno", Spawner_fileno, METH_NOARGS, "The eventfd that is readable when completions() has something."},
    {"close", Spawner_close, METH_NOARGS,
     "Stop the threads; jobs they started are killed by their parent-death signal."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot spawner_slots[] = {
    {Py_tp_new, Spawner_new},
    {Py_tp_dealloc, Spawner_dealloc},
    {Py_tp_methods, spawner_methods},
    {Py_tp_doc,
     "Spawner(threads, scratch): threads that clone, each with a small root built on the directory scratch."},
    {0, NULL},
};

static PyType_Spec spawner_spec = {"diyc._core.Spawner", sizeof(SpawnerObject), 0, Py_TPFLAGS_DEFAULT, spawner_slots};

/* ---- functions ---- */

static PyObject *core_user_namespace(PyObject *module, PyObject *argument) {
    (void)module;
    PyObject *bytes = PyUnicode_AsUTF8String(argument);
    if (!bytes)
        return NULL;
    const char *what = NULL, *id_map = PyBytes_AsString(bytes);
    int fd;
    Py_BEGIN_ALLOW_THREADS fd = user_namespace_new(id_map, &what);
    Py_END_ALLOW_THREADS Py_DECREF(bytes);
    return fd < 0 ? raise_errno(fd, what, NULL) : PyLong_FromLong(fd);
}

static PyObject *core_tree(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"path", "attributes", "userns", "recursive", "follow", NULL};
    PyObject *path;
    unsigned long long attributes = 0;
    int userns = -1, recursive = 0, follow = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&|Kipp:tree", names, PyUnicode_FSConverter, &path, &attributes,
                                     &userns, &recursive, &follow))
        return NULL;
    const char *what = NULL;
    int fd = tree_clone(PyBytes_AsString(path), attributes, userns, recursive, follow, &what);
    PyObject *ret = fd < 0 ? raise_errno(fd, what, path) : PyLong_FromLong(fd);
    Py_DECREF(path);
    return ret;
}

static PyObject *core_limit_devices(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *program;
    int cgroup;
    if (!PyArg_ParseTuple(args, "Si:limit_devices", &program, &cgroup))
        return NULL;
    const char *what = NULL;
    const int error = device_program_attach(PyBytes_AsString(program), (size_t)PyBytes_Size(program), cgroup, &what);
    return error < 0 ? raise_errno(error, what, NULL) : Py_NewRef(Py_None);
}

static PyObject *core_system_calls(PyObject *module, PyObject *unused) {
    (void)module;
    (void)unused;
    PyObject *answers = PyDict_New();
    const char *name;
    for (size_t i = 0; answers; i++) {
        const long ret = system_call_probe(i, &name);
        if (!name)
            break;
        PyObject *answer = PyLong_FromLong(ret);
        if (!answer || PyDict_SetItemString(answers, name, answer) < 0)
            Py_CLEAR(answers);
        Py_XDECREF(answer);
    }
    return answers;
}

static PyMethodDef core_methods[] = {
    {"user_namespace", core_user_namespace, METH_O,
     "user_namespace(id_map) -> descriptor of a new user namespace with that map for users and groups."},
    {"tree", (PyCFunction)(void (*)(void))core_tree, METH_VARARGS | METH_KEYWORDS,
     "tree(path, attributes=0, userns=-1, recursive=False, follow=False) -> descriptor of a detached clone of the "
     "mount\n"
     "at path; without follow, a symlink in the path is an error."},
    {"limit_devices", core_limit_devices, METH_VARARGS,
     "limit_devices(program, cgroup): bind BPF instructions for devices to a cgroup v2 directory."},
    {"system_calls", core_system_calls, METH_NOARGS,
     "system_calls() -> what each system call that diyc makes and that may be missing answers: {name: -errno}."},
    {NULL, NULL, 0, NULL},
};

static int module_add_type(PyObject *module, PyType_Spec *spec, const char *name) {
    PyObject *type = PyType_FromModuleAndSpec(module, spec, NULL);
    if (!type)
        return -1;
    int failed = PyModule_AddObjectRef(module, name, type);
    Py_DECREF(type);
    return failed;
}

static int module_exec(PyObject *module) {
    PyObject *names = PyTuple_New(STEP_COUNT);
    for (int i = 0; names && i < STEP_COUNT; i++)
        PyTuple_SetItem(names, i, PyUnicode_FromString(step_names[i]));
    int failed = names ? PyModule_AddObjectRef(module, "STEP_NAMES", names) : -1;
    Py_XDECREF(names);
    if (failed || module_add_type(module, &plan_spec, "Plan") < 0 ||
        module_add_type(module, &spawner_spec, "Spawner") < 0)
        return -1;
    return PyModule_AddIntConstant(module, "MARK_COUNT", MARK_COUNT);
}

static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, module_exec}, {0, NULL}};

static PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "diyc._core",
    .m_doc = "What must happen in C: plans in C memory, spawner threads, detached mounts.",
    .m_methods = core_methods,
    .m_slots = module_slots,
};

PyMODINIT_FUNC PyInit__core(void) {
    return PyModuleDef_Init(&module_definition);
}
