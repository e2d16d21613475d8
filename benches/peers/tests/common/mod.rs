//! Twenty tests of one body.

/// `many!(tests)` is `tests!(t01 t02 ..)`.
macro_rules! many {
    ($macro:ident) => {
        $macro!(t01 t02 t03 t04 t05 t06 t07 t08 t09 t10 t11 t12 t13 t14 t15 t16 t17 t18 t19 t20);
    };
}
