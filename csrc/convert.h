/* Python values -> C memory: the only converter. Included by plan.c and module.c alone. */
#ifndef DIYC_CONVERT_H
#define DIYC_CONVERT_H

#include <Python.h>

#include "plan.h"

/* A plan from a sequence of (kind, fd, out, flags, source, target, type, data) tuples; kind is an index into
 * step_names, the texts are str, bytes or None, data is bytes or None. NULL with an exception set: TypeError
 * or ValueError naming the step. Free with plan_free. */
struct plan *plan_convert(PyObject *steps, unsigned long long clone_flags, unsigned registers, unsigned spawner_steps);
void plan_free(struct plan *plan);

/* One run of `plan`, in one block of memory that plain free() releases. */
struct run *run_convert(const struct plan *plan, PyObject *descriptors, PyObject *argv, PyObject *envp, PyObject *paths,
                        PyObject *id_map, PyObject *oom_score_adj);

#endif
