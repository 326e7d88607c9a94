//! Parameters and moments in GPU memory. The model is still computed on the host, from a copy of the
//! parameters. The optimizer runs on the device, on the tensors that are saved from there.

use super::training::{Gradients, Training};
use crate::adamw::Rates;
use crate::gpu::{Gpu, Pinned, Span, Stream, allocate, source};
use ashore::{Dtype, Result, StateDict};
use std::sync::Arc;

/// One parameter: its values, first and second moments, and the gradient.
struct Place {
    tensors: [Span; 4],
    /// Its offset in either half of the pinned memory.
    at: u64,
}

/// The part of a training run that is on the device.
pub struct Resident {
    stream: Stream,
    places: Vec<Place>,
    /// One half for copies to the device and one for copies from it, which may overlap.
    pinned: Pinned,
}

impl Resident {
    /// Allocates memory on the device, and copies parameters and moments there.
    ///
    /// # Errors
    /// `Device`.
    pub fn new(gpu: &Arc<Gpu>, training: &Training) -> Result<Self> {
        let stream = Stream::new(gpu)?;
        let (mut places, mut at) = (Vec::new(), 0);
        for parameter in &training.parameters {
            let bytes = size_of_val(&parameter[..]) as u64;
            let memory = allocate(&stream, 4 * bytes)?;
            let part = |i| memory.part(i * bytes, bytes);
            places.push(Place { tensors: [part(0)?, part(1)?, part(2)?, part(3)?], at });
            at += bytes;
        }
        let mut resident = Self { pinned: Pinned::allocated(&stream, 2 * at)?, stream, places };
        for (kind, tensors) in [&training.parameters, &training.first, &training.second].into_iter().enumerate() {
            resident.send(kind, tensors.iter().map(|tensor| &tensor[..]))?;
        }
        resident.stream.wait()?;
        Ok(resident)
    }

    /// The stream that changes the tensors.
    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Runs the optimizer on the device. Afterwards the host has the new parameters, for the next forward
    /// pass, and old moments.
    ///
    /// # Errors
    /// `Device`.
    pub fn update(&mut self, training: &mut Training, gradients: &Gradients) -> Result<()> {
        training.step += 1;
        self.send(3, gradients.by_tensor.iter().map(|tensor| &tensor[..]))?;
        for Place { tensors: [parameter, first, second, gradient], .. } in &self.places {
            self.stream.adamw([parameter, first, second, gradient], Rates::at(training.step))?;
        }
        self.fetch(0, &mut training.parameters)
    }

    /// Copies the moments to the host, which makes `training` complete.
    ///
    /// # Errors
    /// `Device`.
    pub fn settle(&mut self, training: &mut Training) -> Result<()> {
        self.fetch(0, &mut training.parameters)?;
        self.fetch(1, &mut training.first)?;
        self.fetch(2, &mut training.second)
    }

    /// Returns the state for a save: device memory, read until the fence.
    ///
    /// # Errors
    /// Those of the state dict.
    pub fn state(&self, training: &Training) -> Result<StateDict<'static>> {
        let mut state = StateDict::with_capacity(3 * self.places.len());
        let spans = (0..3).flat_map(|kind| self.places.iter().map(move |place| &place.tensors[kind]));
        for ((name, dims, _), span) in training.tensors().zip(spans) {
            state.tensor(name, source(span, Dtype::F32, dims)?)?;
        }
        training.describe(&mut state)?;
        Ok(state)
    }

    fn send<'t>(&mut self, kind: usize, tensors: impl Iterator<Item = &'t [f32]>) -> Result<()> {
        let mut rest = self.pinned.bytes()?;
        for tensor in tensors {
            let (part, after) = rest.split_at_mut(size_of_val(tensor));
            part.copy_from_slice(bytemuck::cast_slice(tensor));
            rest = after;
        }
        self.places.iter().try_for_each(|place| self.pinned.send(place.at, &place.tensors[kind]))
    }

    fn fetch(&mut self, kind: usize, tensors: &mut [Arc<Vec<f32>>]) -> Result<()> {
        let half = self.pinned.len() / 2;
        self.places.iter().try_for_each(|place| self.pinned.fetch(half + place.at, &place.tensors[kind]))?;
        let mut rest = &self.pinned.bytes()?[half as usize..];
        for tensor in tensors {
            let tensor: &mut [u8] = bytemuck::cast_slice_mut(Arc::make_mut(tensor).as_mut_slice());
            let (part, after) = rest.split_at(tensor.len());
            tensor.copy_from_slice(part);
            rest = after;
        }
        Ok(())
    }
}
