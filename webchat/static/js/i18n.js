// The page's own words in the reader's language. zh-CN.json and en.json have the same keys.

let texts = {};

/** Load the words for `navigator.language` and write them into every element that asks for some. */
export async function loadTexts() {
  const locale = navigator.language.toLowerCase().startsWith("zh") ? "zh-CN" : "en";
  texts = await (await fetch(`static/i18n/${locale}.json`)).json();
  document.documentElement.lang = locale;
  for (const element of document.querySelectorAll("[data-text]")) element.textContent = t(element.dataset.text);
  for (const element of document.querySelectorAll("[data-label]")) {
    element.setAttribute("aria-label", t(element.dataset.label));
  }
  for (const element of document.querySelectorAll("[data-placeholder]")) {
    element.placeholder = t(element.dataset.placeholder);
  }
}

/** The words for `name`, with `{placeholders}` filled in. */
export function t(name, values = {}) {
  return texts[name].replace(/\{(\w+)\}/g, (_, placeholder) => values[placeholder]);
}
