# A board that learns how its owner says the words it knows: it asks for each word a few times, then trains on all of
# them. On the board: the package, a plan with a training program (mic.ulm), codes.py, spectrum.py (as .mpy: it has
# native code), this file, and as sensor.py one of sensor_*.py.
#   mpremote run learn_mic.py
import gc

import sensor
from codes import Codes, buffer
from micropython import const

import ulearn

_EACH = const(4)  # clips a word to train on
_JUDGES = const(2)  # clips a word that judge, before and after; nothing trains on them
_EPOCHS = const(6)
_CHECKPOINT = "mic.ckpt"

model = ulearn.load("mic.ulm")
trainer = ulearn.Trainer(model)
codes = Codes(model, sensor)
x = buffer(sensor)
words = model.meta.get("labels") or [str(i) for i in range(model.classes)]


def record(each):
    # So many clips of every word. A recording knows what it plays; a person is told what to say.
    clips = ulearn.Samples(model, each * len(words))
    for i in range(each * len(words)):
        word = i % len(words)
        if not hasattr(sensor, "LABELS"):
            input("say '%s' right after Enter " % words[word])
        label = sensor.read(x)
        clips.add(codes.of(x), word if label is None else label)
    return clips


def main(each=_EACH, judges=_JUDGES, epochs=_EPOCHS):
    try:
        model.restore(_CHECKPOINT)
    except ValueError as fault:
        print(fault)  # there is none yet, or it is damaged: go on with the plan's own weights
    held_out, clips = record(judges), record(each)
    before = trainer.evaluate(held_out)
    gc.collect()
    trainer.fit(clips, epochs=epochs)
    after = trainer.evaluate(held_out)
    if after >= before:
        model.save(_CHECKPOINT)
    print("right of %d held out: before %d %%, after %d %%" % (len(held_out), before * 100, after * 100))


if __name__ == "__main__":
    main()
