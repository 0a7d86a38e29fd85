// The step loop. Plain C++: no torch, no Python.
#pragma once
