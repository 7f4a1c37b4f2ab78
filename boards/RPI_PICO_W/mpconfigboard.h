#include "boards/RPI_PICO_W/mpconfigboard.h" // the port's own
#include "../rp2.h"
