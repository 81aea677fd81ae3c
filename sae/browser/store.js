"use strict";
// The data files call MONOSEMA.put(key, text); `load` asks for one and gives its parsed JSON.

const MONOSEMA = (() => {
  const known = new Map();
  return {
    put(key, text) {
      known.set(key, JSON.parse(text));
    },
    get(key) {
      return known.get(key);
    },
    load(key) {
      if (known.has(key)) return Promise.resolve(known.get(key));
      return new Promise((resolve, reject) => {
        const script = document.createElement("script");
        script.src = `data/${key}.js`;
        script.onload = () => resolve(known.get(key));
        script.onerror = () => reject(new Error(`data/${key}.js could not be read`));
        document.head.append(script);
      });
    },
  };
})();
