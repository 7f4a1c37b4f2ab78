# A plan in a ROMFS by its plain name: it is used in place, a new base and a checkpoint lie in the file system, and the
# next load takes them up. Run by tests/test_romfs.py.
import vfs


def main(folder, name):
    with open(folder + "/image", "rb") as f:
        vfs.mount(vfs.VfsRom(f.read()), "/rom")
    import ulearn

    print("package", ulearn.__file__)
    with open(folder + "/" + name + ".x", "rb") as f:
        x = f.read()
    print(ulearn.load("/rom/" + name).frozen)
    model = ulearn.load(name)
    print(model.frozen)
    assert model.path == name and ulearn.load("/rom/" + name).meta == model.meta
    plain = bytes(model.train_blob)
    first = model.base_id
    trainer = ulearn.Trainer(model, 0.5, skip=0)
    for i in range(20):
        trainer.step(x, i % model.classes)
    assert bytes(model.train_blob) != plain
    model.apply(model.update(20))
    learned, second = bytes(model.train_blob), model.base_id
    assert second != first and learned != plain
    model.save("a.ck")
    again = ulearn.load(name)
    assert bytes(again.train_blob) == learned and again.base_id == second
    again.restore("a.ck")
    trainer = ulearn.Trainer(again, 0.5, skip=0)
    trainer.step(x, 0)
    again.reset()
    assert bytes(again.train_blob) == learned
    print("ok")
