// internal.h: what the files of the harness share and kernels do not see.
#ifndef SIMT_INTERNAL_H
#define SIMT_INTERNAL_H
#include <string>

namespace simt {
void forget_copies();                       // a new block: no cp.async is under way
std::string line_of(const void *pc);        // file:line of a return address in this library
}  // namespace simt
#endif
