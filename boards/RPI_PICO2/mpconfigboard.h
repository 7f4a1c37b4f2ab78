#include "boards/RPI_PICO2/mpconfigboard.h" // the port's own
#include "../rp2.h"
