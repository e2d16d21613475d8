//! What was not found, as `None`.

use super::Result;

/// `.optional()` on this crate's results, as Diesel has it on its own.
///
/// ```
/// use diesel_session::{Error, OptionalExt};
/// # fn find() -> diesel_session::Result<i32> { Err(diesel::result::Error::NotFound.into()) }
/// assert_eq!(find().optional()?, None);
/// # Ok::<(), Error>(())
/// ```
pub trait OptionalExt<T> {
    /// Turns "nothing found" into `Ok(None)`; other errors stay.
    ///
    /// # Errors
    /// Every error but [`Error::NotFound`](crate::Error::NotFound).
    fn optional(self) -> Result<Option<T>>;
}

impl<T> OptionalExt<T> for Result<T> {
    fn optional(self) -> Result<Option<T>> {
        match self {
            Ok(value) => Ok(Some(value)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }
}
