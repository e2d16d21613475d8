//~ error[E0277]: `Plain` is not an entity
//~ add `#[derive(Entity)]` beside `#[derive(Queryable, Selectable)]` of `Plain`
use errors::{DB, Db};

struct Plain;

fn main() {
    let session: Db = DB.session().unwrap();
    let _ = session.get::<Plain>(1);
}
