# What is said when something is wrong, by what it is about. Imported only then: a board's heap is not for texts.
_TEXTS = {
    "executor": "%s: %s",
    "cut": "%s: no cut is named '%s'",
    "numbers": "%s has %d numbers, expected %d",
    "label": "label %d, expected 0 to %d",
    "program": "%s: the plan has no training program; prepare it with a scheme",
    "rate": "learning rate %s, expected 0 or a number from 1e-9 to 1e6",
    "capacity": "room for %d samples, expected 1 to 65535",
    "epochs": "%d epochs, expected 1 to 65535",
    "samples": "there is no sample to train on",
    "resume": "%s: there is no fit to resume: none was begun, or it came to its end",
    "steps": "%d steps were taken, expected at most %d epochs of %d samples",
}
EXECUTOR = {
    -1: "a buffer is missing or has the wrong size",
    -2: "a buffer does not start at a multiple of 4",
    -3: "the native module here does not know one of the plan's operations; deploy the plan to this board",
    -4: "records outside the program were asked for",
    -5: "the label is not below the number of classes",
    -6: "a table of the plan makes this step impossible",
}


def refuse(what, *values):
    raise ValueError(_TEXTS[what] % values)
