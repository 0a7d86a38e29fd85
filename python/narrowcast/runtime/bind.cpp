#include <pybind11/pybind11.h>

#include "executor.h"

PYBIND11_MODULE(_runtime, m) { m.doc() = "narrowcast's step loop"; }
