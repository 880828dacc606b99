// Unlocked: the interpreter's lock, given back for as long as this lives.
//
// As nanobind's gil_scoped_release, but for a thread that is still at work when the interpreter ends, as a daemon
// thread may be: until Python 3.14 taking the lock then unwinds the thread, which in a destructor ends the process. The
// thread stops here instead, as it does in Python 3.14, and ends with the process.
#pragma once

#include <Python.h>
#include <cxxabi.h>
#include <unistd.h>

namespace fourmoe::python {

class Unlocked {
 public:
  Unlocked() : state_(PyEval_SaveThread()) {}
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;
  ~Unlocked() {
    try {
      PyEval_RestoreThread(state_);
    } catch (const abi::__forced_unwind&) {
      for (;;) pause();
    }
  }

 private:
  PyThreadState* state_;
};

}  // namespace fourmoe::python
