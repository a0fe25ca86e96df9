// The HTTP example in JavaScript, for QuickJS: it has no TextEncoder, and for ASCII the character codes are the bytes.
const bytes = (text) => Uint8Array.from(text, (character) => character.charCodeAt(0));

export const handler = {
  handle({ target, body }) {
    if (target === "/echo") {
      return { status: 200, headers: "content-type: application/octet-stream\r\n", body };
    }
    return { status: 200, headers: "content-type: text/plain\r\n", body: bytes("hello from JavaScript\n") };
  },
};

export const health = { check() {} };
