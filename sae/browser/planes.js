// What the map is drawn from: the planes that the latents can be laid out in, and its section.
"use strict";

/** A section with the map of one of the dictionaries. */
function mapSection(dictionaries) {
  const frame = el("div", { class: "map-frame" });
  const open = async (dictionary) => {
    frame.replaceChildren(el("p", { class: "notice" }, "Reading the latents …"));
    const map = await readMap(dictionary).catch((error) => error);
    frame.replaceChildren(
      map instanceof Error
        ? el("p", { role: "alert" }, said(map.message))
        : new LatentMap(map).node,
    );
  };
  const options = dictionaries.map((one) => [one.id, visible(one.name)]);
  const choose = (id) => open(router.dictionaries.get(id));
  const choices = options.length > 1 ? choice("Dictionary", options, options[0][0], choose) : null;
  const node = section("Map of latents", { id: "map" }, choices, frame);
  node.start = () => open(dictionaries[0]);
  return node;
}

/** The planes that a dictionary's latents can be laid out in, and the columns that colour them. */
async function readMap(about) {
  const dictionary = await about.ready();
  const planes = [];
  const file = dictionary.map ? await load(`${dictionary.id}/map`) : null;
  for (const [i, { x, y }] of (file?.layouts ?? []).entries())
    planes.push({ ...dictionary.map.layouts[i], x: floats(x), y: floats(y), alike: true });
  const density = dictionary.values.get("density").map((value) => Math.log10(value || NaN));
  for (const { id, name } of dictionary.columns.filter((column) => column.kind === "score"))
    planes.push({
      name: `density and ${name}`,
      note: `Density (logarithmic) to the right, ${name} upwards.`,
      x: density,
      y: dictionary.values.get(id),
    });
  if (!planes.length)
    planes.push({
      name: "density and largest activation",
      note: "Density (logarithmic) to the right, largest activation upwards.",
      x: density,
      y: dictionary.values.get("max_activation"),
    });
  return { dictionary, planes, cluster: file?.cluster ? integers(file.cluster) : null };
}
