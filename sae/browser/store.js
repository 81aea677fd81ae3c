// The data files: each is a script of one call of MONOSEMA.put, so that a folder opens without a
// server. Files are loaded when they are asked for, once.
"use strict";

const MONOSEMA = {
  files: new Map(),
  put(key, text) {
    this.files.set(key, JSON.parse(text));
  },
};

const loading = new Map();

/** The content of data/KEY.js. */
function load(key) {
  if (!loading.has(key)) loading.set(key, request(key));
  return loading.get(key);
}

function request(key) {
  if (MONOSEMA.files.has(key)) return Promise.resolve(MONOSEMA.files.get(key));
  return new Promise((resolve, reject) => {
    const script = document.createElement("script");
    const fail = () => {
      loading.delete(key);
      reject(new Error(`data/${key}.js could not be read`));
    };
    script.src = `data/${key}.js`;
    script.onerror = fail;
    script.onload = () => {
      script.remove();
      if (MONOSEMA.files.has(key)) resolve(MONOSEMA.files.get(key));
      else fail();
    };
    document.head.append(script);
  });
}

function bytes(base64) {
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
}

/** Little-endian arrays, which is how every browser's machine keeps them. */
const floats = (base64) => new Float32Array(bytes(base64).buffer);
const integers = (base64) => new Int32Array(bytes(base64).buffer);
