# As machine.py on the Unix port: buses that play wire.bin (tests/test_examples.py).
class Pin:
    IN = PULL_UP = 0

    def __init__(self, *_):
        pass


class _Wire:
    def __init__(self, *_, **__):
        self.file = open("wire.bin", "rb")
        self.written = []

    def writeto_mem(self, address, register, data):
        self.written.append((address, register, data[0]))

    def readfrom_mem_into(self, address, register, data):
        assert (address, register, len(data)) == (0x68, 0x3B, 14)
        assert self.file.readinto(data) == 14

    def readinto(self, data):
        return self.file.readinto(data)


class I2C(_Wire):
    pass


class I2S(_Wire):
    RX = MONO = 0
