// Structure-aware mutation: JSON stays JSON most of the time, the length of a safetensors header stays right, and so do
// the lengths of a graph's nested messages.
#pragma once

#include <cstddef>
#include <cstdint>
#include <random>
#include <string>

// What an input is: its first byte, modulo `Kinds`, or what the environment variable QUANTEMPO_FUZZ_TARGET says for all.
enum Input : int { Manifest, Program, SplitProgram, Vectors, Table, Graph, Record, Cached, Kinds };
int kind_of(const std::uint8_t* data);

// Changes an input (a selector byte, then a document) in place; returns its new size.
std::size_t mutate(std::uint8_t* data, std::size_t size, std::size_t most, unsigned seed);

// Changes an ONNX file as a tree of fields.  False where it is none.
bool mutate_graph(std::string& document, std::mt19937& random);
