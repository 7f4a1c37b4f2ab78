# As labels.py on the board: a button a class, each between its pin and ground. None while no button is held.
from machine import Pin

_PINS = (10, 11, 12, 13)  # class 0, 1, 2, 3; wire them as you like

buttons = [Pin(number, Pin.IN, Pin.PULL_UP) for number in _PINS]


def label():
    for i in range(len(buttons)):
        if not buttons[i].value():
            return i
    return None
