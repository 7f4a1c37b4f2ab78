#include "boards/RPI_PICO/mpconfigboard.h" // the port's own
#include "../rp2.h"
