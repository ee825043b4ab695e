// The gradient of convolutions for an x with few channels, in vectors of pixels.
//
// The tiles of conv.cc have a lane for each channel of x: of a photograph's three, they leave most
// lanes empty. Here lanes are target pixels, and g is turned so that its pixels are neighbours in
// memory, a plane for each of its channels. Limited by arithmetic too, and where g has few channels
// for each of x by turning it.

#pragma once

#include <vector>

#include "products.h"
#include "window.h"

namespace jadder {

// Computes dx and returns true, or leaves it to others: where they fill their lanes better, where w
// is not finite, and where g has zeros between its pixels.
template <typename T>
bool ConvDxOfFewChannels(const Kernels& kernels, Pool& pool, const ConvShape& shape,
                         const Form& form, const std::vector<Phase> (&phases)[2], const T* x,
                         const T* w, const T* g, float* dx);

}  // namespace jadder
