//! The macro that exports functions as symbols of the driver.

/// Exports functions under their own names. Each call is counted, and may be made to fail, before the body
/// runs.
macro_rules! export {
    ($($kind:ident fn $name:ident($($argument:ident: $type:ty),* $(,)?) $body:block)*) => { $(
        // SAFETY: the symbol is the driver's; this library is only ever opened in place of the driver.
        #[unsafe(no_mangle)]
        extern "C" fn $name($($argument: $type),*) -> i32 {
            $crate::call::call(stringify!($name), $crate::call::Needs::$kind, move || $body)
        }
    )* };
}
pub(crate) use export;
