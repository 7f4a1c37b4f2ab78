# As sensor.py on the board: a recording in place of a sensor. sensor.bin holds its samples, each with its label behind
# it (uint16); `ulearn collect --playback FILE.npz` puts both on a board for samples of any shape.
SHAPE = (16, 6)  # as sensor_mpu6050.py has them
DTYPE = "int16"
LABELS = ()

_label = bytearray(2)
_file = open("sensor.bin", "rb")


def read(x):
    # Fills x and returns what it is; after the last sample comes the first one.
    if not _file.readinto(x):
        _file.seek(0)
        _file.readinto(x)
    _file.readinto(_label)
    return _label[0] | _label[1] << 8
