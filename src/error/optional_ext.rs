//! Turns "not found" into `None`.

use super::Result;

/// `.optional()` for the results of this crate, as Diesel has it for its own results.
///
/// ```
/// use diesel_session::{Error, OptionalExt};
/// # fn find() -> diesel_session::Result<i32> { Err(diesel::result::Error::NotFound.into()) }
/// assert_eq!(find().optional()?, None);
/// # Ok::<(), Error>(())
/// ```
pub trait OptionalExt<T> {
    /// Turns "not found" into `Ok(None)`. Other errors are returned unchanged.
    ///
    /// # Errors
    /// Every error except [`ErrorKind::NotFound`](crate::ErrorKind::NotFound).
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
