// What is kept in the browser: pictures, jobs that run, and the pictures on the desk.

const NAME = "minisd";
/** Stands in for the database where the browser gives none, as some private windows do. */
const memory = { pictures: new Map(), jobs: new Map(), desk: new Map() };

let opening;

function open() {
  opening ??= new Promise((resolve) => {
    let asked;
    try {
      asked = indexedDB.open(NAME, 1);
    } catch {
      return resolve(null);
    }
    asked.onupgradeneeded = () => {
      asked.result.createObjectStore("pictures", { keyPath: "id" }).createIndex("time", "time");
      asked.result.createObjectStore("jobs", { keyPath: "id" });
      asked.result.createObjectStore("desk");
    };
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = () => resolve(null);
  });
  return opening;
}

/** Does something with a store, `use(store)`, and gives the result of the request that it returns. */
async function within(name, mode, use) {
  const database = await open();
  return new Promise((resolve, reject) => {
    const transaction = database.transaction(name, mode);
    const asked = use(transaction.objectStore(name));
    transaction.oncomplete = () => resolve(asked?.result);
    transaction.onerror = transaction.onabort = () => reject(transaction.error);
  });
}

async function put(name, value, key) {
  if (!(await open())) return void memory[name].set(key ?? value.id, value);
  // The key of those that have one inside is not said again.
  await within(name, "readwrite", (store) => (name === "desk" ? store.put(value, key) : store.put(value)));
}

async function remove(name, key) {
  if (!(await open())) return void memory[name].delete(key);
  await within(name, "readwrite", (store) => store.delete(key));
}

async function all(name) {
  if (!(await open())) return [...memory[name].values()];
  return within(name, "readonly", (store) => store.getAll());
}

/** Keeps a picture: `{id, time, blob, prompt, settings, width, height, seconds, image, mask}`. */
export const keepPicture = (picture) => put("pictures", picture);
export const dropPicture = (id) => remove("pictures", id);

/** All that are kept, the newest first. */
export async function keptPictures() {
  return (await all("pictures")).sort((one, other) => other.time - one.time);
}

/** Remembers a job of the server's, so that its picture is fetched even after a reload. */
export const rememberJob = (job) => put("jobs", job);
export const forgetJob = (id) => remove("jobs", id);
export async function rememberedJobs() {
  return (await all("jobs")).sort((one, other) => one.time - other.time);
}

/** Keeps a file of the desk, or forgets it where it is null. */
export async function saveBlob(name, blob) {
  try {
    await (blob ? put("desk", blob, name) : remove("desk", name));
  } catch {
    // the disk is full: it lasts as long as the page
  }
}

export async function loadBlobs(names) {
  if (!(await open())) return {};
  const values = await Promise.all(names.map((name) => within("desk", "readonly", (store) => store.get(name))));
  return Object.fromEntries(names.map((name, index) => [name, values[index]]));
}
