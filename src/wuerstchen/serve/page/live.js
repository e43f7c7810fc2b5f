// Live mode: every change of the form generates again with the same seed, and one entry shows the result.

const DELAY_MS = 150; // after the last change, so that a typed word is one job

export class Live {
  on = false;
  #timer = null;
  #sent = null; // what the last job was made from
  #sending = false;
  #again = false; // a change while a job was being sent

  /** `read()`: settings and image of the form, or null if they are not complete. `draw(settings, image)`: replaces the last job. */
  constructor({ read, draw }) {
    this.read = read;
    this.draw = draw;
  }

  set(on) {
    this.on = on;
    this.#sent = null;
    this.changed();
  }

  changed() {
    clearTimeout(this.#timer);
    if (this.on) this.#timer = setTimeout(() => this.#send(), DELAY_MS);
  }

  /** Sends one job at a time: the next one needs to know the id of the one that it replaces. */
  async #send() {
    if (this.#sending) {
      this.#again = true;
      return;
    }
    const found = this.on && this.read();
    const wanted = JSON.stringify(found);
    if (!found || wanted === this.#sent) return;
    this.#sent = wanted;
    this.#sending = true;
    try {
      await this.draw(found.settings, found.image);
    } catch (error) {
      this.#sent = null; // the same settings may be tried again
      throw error;
    } finally {
      this.#sending = false;
      if (this.#again) {
        this.#again = false;
        this.#send();
      }
    }
  }
}
