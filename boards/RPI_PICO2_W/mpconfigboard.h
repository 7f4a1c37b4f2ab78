#include "boards/RPI_PICO2_W/mpconfigboard.h" // the port's own
#include "../rp2.h"
