/** The bundle is incomplete, damaged, or of a newer edgetune. The message names the file. */
export class BundleError extends Error {
  name = "BundleError";
}

/** The adapter is not one of this bundle, does not fit it, or changes nothing. */
export class AdapterError extends Error {
  name = "AdapterError";
}

/** A line of a file of rows cannot be learned from. The message begins with its number. */
export class RowError extends Error {
  name = "RowError";
}
