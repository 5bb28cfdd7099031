// Functions that the headers of recent C and C++ libraries call, and that older libraries lack. With these
// definitions, a library that is compiled on a recent system runs on systems with glibc 2.17 and the C++
// library of GCC 5.
#include <pthread.h>

#include <condition_variable>
#include <mutex>
#include <new>
#include <sstream>

#ifdef __GLIBCXX__

// Defines a function or variable under the name that the compiler gives the original.
#define KERAS_DAS_AS(symbol) __asm__(symbol) __attribute__((visibility("hidden"), used))

// glibc 2.32: whether the process has a single thread, in which case reference counts need not be atomic.
char single_threaded KERAS_DAS_AS("__libc_single_threaded") = 0;

// GCC 12: `noexcept` was added, and with it a version of the symbol.
void wait(std::condition_variable* condition, std::unique_lock<std::mutex>* lock)
    KERAS_DAS_AS("_ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE");
void wait(std::condition_variable* condition, std::unique_lock<std::mutex>* lock) {
  pthread_cond_wait(condition->native_handle(), lock->mutex()->native_handle());
}

// GCC 11: thrown by allocations of negative or too large sizes.
void throw_bad_array_new_length() KERAS_DAS_AS("_ZSt28__throw_bad_array_new_lengthv");
void throw_bad_array_new_length() { throw std::bad_array_new_length(); }

// GCC 9: the default constructor of a stream, which was inline before.
void construct(std::stringstream* stream)
    KERAS_DAS_AS("_ZNSt7__cxx1118basic_stringstreamIcSt11char_traitsIcESaIcEEC1Ev");
void construct(std::stringstream* stream) { new (stream) std::stringstream(std::ios::in | std::ios::out); }

#endif
