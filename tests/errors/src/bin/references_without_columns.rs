//~ error: a foreign key of several columns is `references(Entity, columns = (one, two))`, in the order of the key of the entity; one of one column is `references = Entity` on its field
use diesel::prelude::*;
use diesel_session::Entity;
use errors::User;
use errors::schema::posts;

#[derive(Debug, Clone, Queryable, Selectable, Entity)]
#[diesel(table_name = posts)]
#[entity(references(User))]
pub struct Post {
    pub id: i32,
    pub author_id: i32,
}

fn main() {}
